"""Capture: a module goes in, what is known of it comes out, and nothing of the original has changed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn

from fxopt.capture.call import Call
from fxopt.capture.captured import Captured, Coverage
from fxopt.capture.chance import random_state_kept
from fxopt.capture.fake import without_values
from fxopt.capture.found import Found
from fxopt.capture.independent import independent_copy
from fxopt.capture.recapture import Recapturing
from fxopt.capture.state import with_versions
from fxopt.capture.tree import Builder
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs


@with_versions()
def capture(
    module: nn.Module,
    args: tuple[Any, ...] | torch.Tensor | Inputs = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    check: bool = True,
    fake: bool = False,
    on_guard_failure: Literal["error", "recapture"] = "error",
) -> Captured:
    """Capture `module` as a graph by running it once on example inputs.

    Whatever runs in eager is captured. A part whose Python code decides on values of the inputs stays opaque,
    as small as possible, and its children are captured as graphs of their own. The module itself, its mode
    and the random state are as before; the result shares nothing with it that is ever written.

    What Python code decides on sizes is guarded. Out of sight is the question whether two arguments are one tensor:
    what the example gives twice is recorded as two.

    Args:
        module: any module, in the mode that is to be captured first; the other mode comes along.
        args: positional arguments of an example call; a single tensor stands for itself, `Inputs` for the whole call.
        kwargs: keyword arguments of it.
        check: run what came out on the example, and keep as opaque what gives other outputs than the module.
        fake: capture on tensors that have shapes but no values, so that a model too large to run, or one built on
            the meta device, takes no memory. What needs values stays opaque.
        on_guard_failure: what a call outside of the guards does: raise a `GuardError`, or capture once more and
            keep both. What recaptures is for use as it is, not for passes: they would not see later captures.

    Raises:
        CaptureError: an argument is a generator, which can be read only once, or the module is TorchScript.
        Exception: whatever its own forward raises on them, with a note that says so.
    """
    began = time.perf_counter()
    inputs = Inputs.of(args) if not isinstance(args, tuple) else Inputs(args)
    inputs = Inputs(inputs.args, {**inputs.kwargs, **(kwargs or {})}, inputs.static)
    call = Call(inputs.args, inputs.kwargs, inputs.static)
    call.check(module)
    if fake:
        return _capture_fake(module, inputs, call, began)
    with random_state_kept():
        try:
            built = _built(module, call, check, on_guard_failure)
        except RuntimeError as error:
            if module.training or not torch.is_grad_enabled():
                raise
            # What is written for inference may write where gradients forbid it, as into the parts of what it splits.
            with torch.no_grad():
                try:
                    built = _built(module, call, check, on_guard_failure)
                except Exception:  # it is broken either way
                    raise error from None
        return _captured(*built, inputs, call, began)


def _built(
    module: nn.Module, call: Call, check: bool, on_guard_failure: str
) -> tuple[GraphModule, GraphModule, Found, tuple[str, ...]]:
    """What a call of a copy was recorded as: the result, the graph in it, what was found, and notes."""
    duplicate, builder = independent_copy(module), Builder(check=check)
    notes = builder.materialize(duplicate, call)
    if on_guard_failure == "recapture":
        result = Recapturing(duplicate, builder, call.static)
        return cast(GraphModule, result), *result.add(call), notes
    graph_module, found = builder.build(duplicate, call, "")
    return graph_module, graph_module, found, notes


def _capture_fake(module: nn.Module, inputs: Inputs, call: Call, began: float) -> Captured:
    valueless = without_values(module, call)
    with random_state_kept(), valueless.mode:
        graph_module, found = Builder(check=False, fake=True).build(valueless.module, valueless.call, "")
        notes = ("captured without values: outputs were not compared",)
        captured = _captured(graph_module, graph_module, found, notes, inputs, valueless.call, began)
    valueless.give_back_tensors(graph_module)
    return captured


def _captured(
    result: GraphModule,
    graph_module: GraphModule,
    found: Found,
    notes: tuple[str, ...],
    inputs: Inputs,
    call: Call,
    began: float,
) -> Captured:
    measured = Inputs(call.args, call.kwargs)
    return Captured(
        module=result,
        inputs=inputs,
        coverage=_coverage(graph_module, measured, found),
        opaque=tuple(found.opaque),
        guards=tuple(found.guards),
        constants=tuple(found.constants),
        notes=(*notes, *found.notes),
        seconds=time.perf_counter() - began,
        forward_seconds=found.forward_seconds,
    )


def _coverage(module: GraphModule, inputs: Inputs, found: Found) -> Coverage:
    if not found.opaque:
        return Coverage(1.0, 1.0, 1.0)
    from fxopt.capture.coverage import coverage

    return coverage(module, inputs, found.calls, found.hidden_calls)
