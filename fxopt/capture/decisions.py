"""Numbers that remember their nodes, and guards for what Python code decides on them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from typing import Any, TypeAlias

import torch
import torch.fx as fx

from fxopt.capture.blamed_inputs import not_static
from fxopt.capture.captured import Guard
from fxopt.capture.describe import describe
from fxopt.capture.frames import user_source
from fxopt.capture.guards import guard, guard_dtype, guard_parts, guard_tensor, refuse, structure
from fxopt.capture.objects import Objects
from fxopt.capture.provenance import Depends
from fxopt.capture.refusals import Refusal, question
from fxopt.capture.sums import Sum, result_of, sum_of
from fxopt.capture.tensors import Value
from fxopt.capture.traced import Traced, traced

_NEGATION = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_Comparison: TypeAlias = tuple[fx.Node, str, Any, bool]
"""What is compared, how, with what, and the answer."""


class Decisions(Objects):
    """What traced numbers report: arithmetic becomes nodes, comparisons become guards."""

    def __init__(self, tensors: Mapping[int, str], static: Collection[torch.Tensor]) -> None:
        super().__init__(tensors, static)
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._sums: dict[fx.Node, Sum] = {}
        self._compared: set[Any] = set()
        self._open: dict[Any, list[tuple[int, _Comparison]]] = {}
        self._decided: list[tuple[fx.Node, str, Guard]] = []

    def size(self, known: Value, dim: int, size: int) -> Any:
        """A size of a tensor as a traced number."""
        key = (known.node, dim)
        if key not in self._sizes:
            self._sizes[key] = self.emit("call_method", "size", (known.node, dim))
        return traced(size, self._sizes[key], known.shape, self)

    def forget_sizes_of(self, graph: fx.Graph) -> None:
        """Read the sizes anew whose nodes are in a graph that ends here."""
        self._sizes = {key: node for key, node in self._sizes.items() if node.graph is not graph}
        self._devices = {key: kept for key, kept in self._devices.items() if kept[1].graph is not graph}

    def arithmetic(self, function: Callable[..., Any], operands: tuple[Any, ...], result: Any) -> Any:
        """Record an operation on numbers and return the traced result; where sizes cancel out, a plain number."""
        if not self.active:
            return result
        found = self._sum(function, operands)
        if found is not None and not found.keys() - {None}:
            return result
        depends = max(value.depends for value in operands if isinstance(value, Traced))
        node = self.emit("call_function", function, tuple(self.argument(value) for value in operands))
        if found is not None:
            self._sums[node] = found
        return traced(result, node, depends, self)

    def _sum(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> Sum | None:
        if not all(isinstance(value, int) for value in operands):
            return None
        return result_of(function, tuple(sum_of(self.argument(value), self._sums) for value in operands))

    def compared(self, relation: str, left: Traced, right: Any, answer: bool) -> None:
        """Guard the answer of a comparison of traced numbers, unless it depends on the values of the input."""
        distance = self._sum(operator.sub, (left, right))
        if self.done or (distance is not None and not distance.keys() - {None}):
            return
        depends = max(left.depends, right.depends) if isinstance(right, Traced) else left.depends
        negated = relation if answer else _NEGATION[relation]
        assumption = f"{describe(left.node)} {negated} {describe(self.argument(right))}"
        reason = "it decides on a number that depends on the values of the input", f" ({assumption})"
        self._answered((left.node, relation, right, answer), depends, assumption, reason)

    def decided(self, node: fx.Node, answer: bool, depends: Depends, what: str) -> None:
        """Guard the answer of a question to a tensor, unless it depends on the values of the input."""
        reason = f"it decides on the value of a tensor ({what}), which depends on the input", ""
        self._answered((node, "==", True, answer), depends, f"{describe(node)} is {answer}", reason)

    def _answered(self, comparison: _Comparison, depends: Depends, assumption: str, reason: tuple[str, str]) -> None:
        """Guard an answer, or record the check that asked; block what would go another way for other values."""
        *compared, answer = comparison
        asked = question(answer)
        before = [] if asked is None else [each for each in self._open.get(asked.key, ()) if each[0] < asked.part.index]
        if asked is not None and asked.is_open:
            self._open[asked.key] = [*before, (asked.part.index, comparison)]
        elif asked is not None and asked.part.is_last and (asked.part.is_whole if before else depends is Depends.DATA):
            self._open.pop(asked.key, None)
            self._check([*(each for _, each in before), (*compared, not answer)], asked.refusal)
        elif depends is Depends.DATA:
            node, _, other, _ = comparison
            self.block(not_static(node, *([other.node] if isinstance(other, Traced) else [])).join(reason))
        else:
            self._guard(*comparison, assumption)

    def _check(self, comparisons: list[_Comparison], refusal: Refusal) -> None:
        """Record a check of the user's that refuses the input where all `comparisons` have these answers."""
        given = [(_followed(node, to), *how, self.argument(to), answer) for node, *how, to, answer in comparisons]
        self.emit("call_function", refuse, (given, refusal.error, refusal.text, refusal.location))

    def read_whole(self, tensor: torch.Tensor) -> None:
        """Guard all values of a tensor."""
        known = self.known(tensor)
        if self.depends(tensor) is Depends.CONSTANT:
            return
        kept = tensor.detach().clone()
        assumption, location = f"the values of {known.node.name}", str(user_source() or "")
        self.guards[Guard(assumption, location)] = None
        expected = self.known(kept).node
        self.fixed.add(expected.target)
        self.emit("call_function", guard_tensor, (known.node, expected, assumption, location))

    def asked_dtype(self, tensor: torch.Tensor) -> None:
        """Guard the dtype of an input, and tell nothing beforehand: most code asks only to make more tensors of it."""
        if tensor not in self.values:
            return
        node = owner = self.known(tensor).node
        while owner.target in (operator.getitem, getattr):
            owner = owner.all_input_nodes[0]
        if owner.op != "placeholder" or (node, tensor.dtype) in self._compared:
            return
        self._compared.add((node, tensor.dtype))
        kind = "of a floating point dtype" if tensor.is_floating_point() else f"of dtype {tensor.dtype}"
        self.emit(
            "call_function", guard_dtype, (node, tensor.dtype, f"{describe(node)} {kind}", str(user_source() or ""))
        )

    def counted(self, node: fx.Node, name: str, parts: tuple[torch.Tensor, ...]) -> None:
        """Guard how many parts a function took a tensor into: Python code counts them unseen."""
        by = "iteration or 'unbind'" if name == "unbind" else f"'{name}'"
        self._guard_parts(node, len(parts), f"{len(parts)} parts by {by}")

    def ranked(self, node: fx.Node, name: str, result: torch.Tensor) -> None:
        """Guard how many dimensions a function leaves: Python code reads them unseen."""
        dims = result.dim()
        self._guard(self.emit("call_method", "dim", (node,)), "==", dims, True, f"{dims} dimensions after '{name}'")

    def received(self, node: fx.Node, value: Any, giver: str) -> None:
        """Guard the structure of what an opaque module or `tolist` gave, where it is more than one tensor or number."""
        expected = structure(value)
        if expected is not None:
            self._guard_parts(node, expected, f"the structure of what {giver} gives")

    def _guard_parts(self, node: fx.Node, expected: Any, assumption: str) -> None:
        location = str(user_source() or "")
        self.guards[Guard(assumption, location)] = None
        self.emit("call_function", guard_parts, (node, expected, assumption, location))

    def _guard(self, node: fx.Node, relation: str, right: Any, answer: bool, assumption: str) -> None:
        expected = self.argument(right)
        key = (node, relation, expected, answer)
        if key in self._compared:
            return
        self._compared.add(key)
        location = str(user_source() or "")
        made = Guard(assumption, location)
        self.guards[made] = None
        self._decided.append((node, self.path, made))
        self.emit("call_function", guard, (node, relation, expected, answer, assumption, location))

    def block_decisions_on(self, written: Set[str]) -> None:
        """Block modules that decided on parameters or buffers that are written: the next call may decide otherwise."""
        for node, path, made in self._decided if written else ():
            names = {name for name in _read_by(node) if name in written}
            if names:
                reason = f"it decides on '{min(names)}', which the forward writes ({made.assumption})"
                self.blocked.setdefault(path, (reason, made.location))


def _followed(node: fx.Node, compared: Any) -> fx.Node:
    """The tensor of which `node` reads a number, where it compares alike: compilers can follow it."""
    if node.target not in (operator.truth, "item"):
        return node
    read = node.all_input_nodes[0]
    dtype = read.meta["tensor_meta"].dtype
    is_whole = isinstance(compared, int) and not (dtype.is_floating_point or dtype.is_complex)
    return read if dtype is torch.bool or is_whole else node


def _read_by(node: fx.Node) -> Iterator[str]:
    """The attributes that a node is computed of."""
    seen, work = {node}, [node]
    while work:
        found = work.pop()
        if found.op == "get_attr":
            yield str(found.target)
        work += [each for each in found.all_input_nodes if each not in seen]
        seen.update(found.all_input_nodes)
