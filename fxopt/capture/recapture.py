"""A module that captures itself again where a call lies outside of what its captures assumed."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch import nn

from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState, random_state_kept
from fxopt.capture.found import Found
from fxopt.capture.independent import same_tensors_copy
from fxopt.capture.signature import static_in
from fxopt.capture.state import State
from fxopt.capture.tree import Builder
from fxopt.errors import GuardError
from fxopt.graph import GraphModule

_TREE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class Recapturing(nn.Module):
    """Runs the first of its captures whose guards hold, and makes another where none does.

    All captures share the parameters and buffers of this module, so training, loading or moving it reaches
    each of them. What it has not is asked of the original, whose methods run captures where they call it. It is no
    GraphModule: passes rewrite one capture, and would not see the next.

    Args:
        original: the module, whose tree is taken over.
        builder: captures it.
        static: as in `Inputs`, of the first call.
    """

    def __init__(self, original: nn.Module, builder: Builder, static: Collection[str | int]):
        super().__init__()
        for part in _TREE:
            self.__dict__[part] = original.__dict__[part]
        self.training = original.training
        self.__dict__["_original"] = original
        self.__dict__["_builder"] = builder
        self.__dict__["_static"] = tuple(static)
        self.__dict__["captures"] = []

    captures: list[GraphModule]
    _original: nn.Module
    _builder: Builder
    _static: tuple[str | int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a capture that holds for these arguments."""
        self._drop_stale()
        for captured in self.captures:
            state, began = State(captured), RandomState()
            try:
                return captured(*args, **kwargs)
            except GuardError:
                # A guard stands where the user's code decided: what was computed before it may have left traces.
                state.restore()
                began.restore()
        with random_state_kept():
            captured, _ = self.add(Call(args, kwargs, static_in(self._original, self._static, args, kwargs)))
        return captured(*args, **kwargs)

    def add(self, call: Call) -> tuple[GraphModule, Found]:
        """Capture for one more call."""
        captured, found = self._builder.build(same_tensors_copy(self._original), call, "")
        self.captures.append(captured)
        return captured, found

    def train(self, mode: bool = True) -> Recapturing:
        """Switch this module and all of its captures."""
        self._original.train(mode)
        self.training = self._original.training
        for captured in self.captures:
            captured.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("_original")
        if original is None or name.startswith("__") or name in self._parameters or name in self._modules:
            return super().__getattr__(name)
        asked = copy.copy(original)  # whose own forward is what the next capture follows
        asked.__dict__["forward"] = functools.wraps(original.forward)(lambda *args, **kwargs: self(*args, **kwargs))
        asked._forward_hooks, asked._forward_pre_hooks = OrderedDict(), OrderedDict()  # the captures have them
        return getattr(asked, name)

    def _drop_stale(self) -> None:
        """Forget captures whose tensors are no longer those of this module, as after a move to another device."""
        now = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        self.captures[:] = [captured for captured in self.captures if _holds(captured, now)]


def _holds(captured: GraphModule, tensors: dict[str, Any]) -> bool:
    own = {**dict(captured.named_parameters()), **dict(captured.named_buffers())}
    return all(own.get(name) is tensor for name, tensor in tensors.items())
