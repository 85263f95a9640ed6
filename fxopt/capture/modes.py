"""Training and evaluation: one graph that asks for its mode, where the two recordings differ in no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx


def merge_modes(evaluation: fx.Graph, training: fx.Graph) -> bool:
    """Make `evaluation` a graph of both modes, if the two differ only in arguments that say the mode.

    These are `training=`, and the probability that attention is given where user code says
    `dropout if self.training else 0.0`. Each becomes a read of the `training` flag of the module whose
    forward made the call.

    Returns whether it was possible; if not, `evaluation` is as it was.
    """
    left, right = list(evaluation.nodes), list(training.nodes)
    if len(left) != len(right):
        return False
    twin = dict(zip(right, left, strict=True))
    changes: list[Callable[[], None]] = []
    for node, other in zip(left, right, strict=True):
        if node.op != other.op or node.target != other.target or set(node.kwargs) != set(other.kwargs):
            return False
        if len(node.args) != len(other.args):
            return False
        for index, value in enumerate(node.args):
            if not _same(value, other.args[index], twin) and not _switch(
                node, value, other.args[index], changes, _Position(index)
            ):
                return False
        for key, value in node.kwargs.items():
            if not _same(value, other.kwargs[key], twin) and not _switch(
                node, value, other.kwargs[key], changes, _Keyword(key)
            ):
                return False
    for change in changes:
        change()
    return True


class _Position(int):
    def put(self, node: fx.Node, value: Any) -> None:
        node.update_arg(int(self), value)


class _Keyword(str):
    def put(self, node: fx.Node, value: Any) -> None:
        node.update_kwarg(str(self), value)


def select(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The value of an argument that differs by mode."""
    return in_training if training else in_evaluation


def _switch(
    node: fx.Node, value: Any, in_training: Any, changes: list[Callable[[], None]], place: _Position | _Keyword
) -> bool:
    if node.op != "call_function" or not isinstance(value, (bool, float)) or not isinstance(in_training, (bool, float)):
        return False

    def change() -> None:
        path = node.meta.get("module_path", "")
        with node.graph.inserting_before(node):
            flag = node.graph.create_node("get_attr", f"{path}.training" if path else "training")
            if (in_training, value) != (True, False):
                flag = node.graph.call_function(select, (flag, in_training, value))
        place.put(node, flag)

    changes.append(change)
    return True


def _same(left: Any, right: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(left, fx.Node):
        return isinstance(right, fx.Node) and twin.get(right) is left
    if isinstance(left, (list, tuple)):
        return (
            type(left) is type(right)
            and len(left) == len(right)
            and all(_same(a, b, twin) for a, b in zip(left, right, strict=True))
        )
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(_same(left[key], right[key], twin) for key in left)
        )
    if isinstance(left, slice):
        return isinstance(right, slice) and all(
            _same(getattr(left, part), getattr(right, part), twin) for part in ("start", "stop", "step")
        )
    return type(left) is type(right) and (left is right or bool(left == right) or left != left)
