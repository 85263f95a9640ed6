"""FX101: a tensor attribute that is neither a parameter nor a buffer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.findings import Fix, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.driver import unregistered
from passes.audit.rule import Found, rule


def _is_loose(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter) and leaf.grad_fn is None


def _fix(evidence: Evidence, kind: type, name: str, value: Any) -> Fix | None:
    # No buffer can have the name of a class attribute, and what has a gradient of its own is none.
    if not isinstance(value, torch.Tensor) or value.requires_grad or hasattr(kind, name):
        return None
    places = list(code.assignments(kind, name))
    if len(places) != 1:
        return None
    path, statement = places[0]
    if not isinstance(statement, ast.Assign) or [ast.unparse(each) for each in statement.targets] != [f"self.{name}"]:
        return None
    if _is_early(kind, statement):
        return None
    # The line may set numbers or parameters in other modules.
    others = [module for _, module in evidence.users if places[0] in code.assignments(type(module), name)]
    if not all(isinstance(vars(module).get(name), (torch.Tensor, NoneType)) for module in others):
        return None
    if any(name in module._parameters for module in others):
        return None
    return code.with_value(path, statement, lambda v: f'self.register_buffer("{name}", {v})', "register the buffer")


def _is_early(kind: type, statement: ast.stmt) -> bool:
    """Whether the base class is initialised behind it: until then there are no buffers."""
    around = [function for _, function in code.methods(kind) if statement in code.parts(ast.stmt, function)]
    later = (call for call in code.parts(ast.Call, *around) if call.lineno > statement.lineno)
    return any(ast.unparse(call.func).endswith(".__init__") for call in later)


@rule("FX101", Severity.ERROR)
def unregistered_tensor(evidence: Evidence) -> Iterator[Found]:
    """A tensor attribute that is neither a parameter nor a buffer.

    `to()`, `cuda()` and `state_dict()` don't see it: it stays on the CPU and is lost on saving.

    Bad:
        self.scale = torch.ones(3)

    Good:
        self.register_buffer("scale", torch.ones(3))

    Fix: call `register_buffer`; pass `persistent=False` where it need not be saved.
    """
    tables = (table for _, module in evidence.modules for table in (module._parameters, module._buffers))
    known = {id(tensor) for table in tables for tensor in table.values()}
    for path, module in evidence.users:
        for name, value in unregistered(module):
            if name == "_flat_weights" or name.startswith("__") or f"{name}_orig" in module._parameters:
                continue
            loose = [leaf for leaf in pytree.tree_leaves(value) if _is_loose(leaf) and id(leaf) not in known]
            if loose:
                what = f"is a {str(loose[0].dtype).removeprefix('torch.')} tensor of shape {tuple(loose[0].shape)}"
                meetings, moved = evidence.devices
                # Where the forward moves it, no device fails; that it is not saved may be meant.
                fine = (path, name) in moved and (path, name) not in {meeting.attribute for meeting in meetings}
                stays = "the forward moves it at each call" if fine else "it stays behind on `to()`"
                message = f"'self.{name}' {what} that is no buffer: {stays}, and is not saved"
                severity, place = Severity.NOTE if fine else None, code.assigned(type(module), name)
                yield Found(message, place, path, (), severity, _fix(evidence, type(module), name, value))
