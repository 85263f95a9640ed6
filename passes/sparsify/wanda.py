"""The length of what each input of a layer saw: |w| |x| of Wanda (Sun et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.batches import run_batches, unaffected
from fxopt.capture.state import modes_kept
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Program, observe
from fxopt.inputs import Inputs
from fxopt.modules import Fused
from passes.sparsify.mask import Masked, PrunedMask

_LAST = ("linear", "matmul", "addmm", "mm", "__matmul__")


def see_inputs(module: GraphModule, found: list[Masked], batches: Iterable[Inputs]) -> set[PrunedMask]:
    """Run the module on all batches and add up the squares of what each masked layer is given.

    Returns the masks that a batch reached: to others all inputs are worth the same, as experts that no router chose.

    Raises:
        PassError: there are no batches, or the module does not take one.
    """
    reached = set[PrunedMask]()
    functional = {id(each.mask): each.mask for each in found if not isinstance(each.owner, Fused)}
    readers = _readers(module, functional)
    visit = _visit(readers, reached)
    with ExitStack() as hooks, torch.no_grad(), modes_kept(module):
        for each in found:
            if isinstance(each.owner, Fused):
                watch = _watch(each.mask, reached)
                hooks.enter_context(each.owner.register_forward_pre_hook(watch, with_kwargs=True))
        module.eval()
        with unaffected(module):
            count = run_batches("sparsify", batches, lambda each: observe(module, each.args, each.kwargs, visit))
            squares = [_squares(each.mask).clone() for each in found]
    if count == 0:
        raise PassError(
            "sparsify: criterion 'wanda' needs the inputs of the layers and there is no calibration data; give some "
            "by `calibration_data` in the model's file, or of fxopt.optimize, or take criterion=magnitude"
        )
    for each, seen in zip(found, squares, strict=True):
        # Behind a gate that is still zero all inputs are worth the same.
        _squares(each.mask).copy_(seen.sqrt() if seen.any() else torch.ones_like(seen))
    return reached


def _squares(mask: PrunedMask) -> torch.Tensor:
    assert mask.input_norm is not None
    return mask.input_norm


def _watch(mask: PrunedMask, reached: set[PrunedMask]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs["input"]
        _add(mask, value, channels_last=isinstance(owner, nn.Linear))
        if value.numel():
            reached.add(mask)

    return hook


def _readers(module: GraphModule, masks: dict[int, PrunedMask]) -> dict[fx.Node, list[tuple[PrunedMask, bool]]]:
    """For each value that a function multiplies with a masked weight: the mask, and whether channels are last."""
    found: dict[fx.Node, list[tuple[PrunedMask, bool]]] = {}
    for region in Program(module).regions:
        for node in region.graph.nodes:
            mask = region.submodule(node) if node.op == "call_module" else None
            if not isinstance(mask, PrunedMask) or id(mask) not in masks:
                continue
            for user in node.users:
                value = next((other for other in user.all_input_nodes if other is not node), None)
                if value is not None:
                    name = str(user.kwargs.get("kind", getattr(user.target, "__name__", user.target)))
                    source = user.args[1] if name == "addmm" else value
                    assert isinstance(source, fx.Node)
                    found.setdefault(source, []).append((mask, name in _LAST))
    return found


def _visit(
    readers: dict[fx.Node, list[tuple[PrunedMask, bool]]], reached: set[PrunedMask]
) -> Callable[[GraphModule, fx.Node, object], None]:
    def visit(_: GraphModule, node: fx.Node, value: object) -> None:
        for mask, channels_last in readers.get(node, ()):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                _add(mask, value, channels_last)
                if value.numel():
                    reached.add(mask)

    return visit


def _add(mask: PrunedMask, value: torch.Tensor, channels_last: bool) -> None:
    norm = _squares(mask)
    rows, _, inputs = norm.shape
    axis = value.dim() - 1 if channels_last else value.dim() - (mask.mask.dim() - 1)
    others = [dim for dim in range(value.dim()) if dim != axis]
    squares = value.detach().float().square().sum(others)
    if mask.outputs == 0:
        # Of a grouped convolution each output sees the inputs of its group only.
        squares = squares.reshape(mask.groups, 1, inputs).expand(-1, rows // mask.groups, -1)
    norm += squares.reshape(-1, 1, inputs)
