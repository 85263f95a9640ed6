"""How much of a module its graphs show, where parts of it are opaque."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fxopt.capture.call import Call
from fxopt.capture.captured import Coverage
from fxopt.capture.chance import random_state_kept
from fxopt.capture.leaves import is_leaf
from fxopt.capture.state import State
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs


def coverage(module: GraphModule, inputs: Inputs, calls: int, hidden_calls: int) -> Coverage:
    """Measure by one forward what runs outside of the graphs.

    Args:
        module: the captured module.
        inputs: what to run it with.
        calls: torch calls that capture recorded.
        hidden_calls: torch calls that it saw inside opaque parts.
    """
    total, hidden = _flops(module, inputs)
    parameters = sum(p.numel() for p in module.parameters())
    hidden_parameters = sum(p.numel() for p in _hidden_parameters(module))
    return Coverage(
        call_sites=_share(hidden_calls, calls + hidden_calls),
        flops=_share(hidden, total),
        parameters=_share(hidden_parameters, parameters),
    )


def _share(hidden: int, total: int) -> float:
    return 1.0 - hidden / total if total else 1.0


def _flops(module: GraphModule, inputs: Inputs) -> tuple[int, int]:
    running = [False]
    counter = _Flops(lambda: running[-1])

    def enter(child: nn.Module, args: Any) -> None:
        running.append(_is_opaque(child))

    def leave(child: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    state = State(module)
    try:
        with (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
            counter,
            torch.no_grad(),
            random_state_kept(),
            # Without values, and without gradients where a forward computes some, it runs up to there.
            suppress(Exception),
        ):
            Call(inputs.args, inputs.kwargs).run(module)
    finally:
        state.restore()
    return counter.total, counter.hidden


class _Flops(TorchDispatchMode):
    """Counts operations, and those while a question is answered by yes."""

    def __init__(self, is_hidden: Callable[[], bool]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.hidden = 0
        self.is_hidden = is_hidden

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, as torch's own counter does, all of the compiler is imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=result) if count is not None else 0
        self.total += flops
        self.hidden += flops if self.is_hidden() else 0
        return result


def _is_opaque(module: nn.Module) -> bool:
    """Whether no graph shows what a module computes: one with Python code of its own, or TorchScript."""
    return isinstance(module, torch.jit.ScriptModule) or not (isinstance(module, GraphModule) or is_leaf(module))


def _hidden_parameters(module: GraphModule) -> list[nn.Parameter]:
    shown: set[int] = set()
    for region in Program(module).regions:
        for node in region.graph.nodes:
            if node.op == "get_attr":
                shown.add(id(region.attribute(node)))
            elif node.op == "call_module" and not _is_opaque(callee := region.submodule(node)):
                shown |= {id(p) for p in callee.parameters()}
    return [p for p in module.parameters() if id(p) not in shown]
