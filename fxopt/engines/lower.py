"""A module -> an executable."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fxopt import spec
from fxopt.capture import capture
from fxopt.capture.independent import independent_copy
from fxopt.capture.state import with_versions
from fxopt.engines.checked import checked
from fxopt.engines.contract import Engine
from fxopt.engines.executable import Executable
from fxopt.engines.memory import collect_beside, hand_back
from fxopt.engines.table import find
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.rewriting import run_pass


def lower(module: nn.Module, inputs: Any, engine: str = "onednn", **options: Any) -> Executable:
    """Build a module for an engine, and check its outputs on the example.

    Batch norms and activations are fused by passes, not by engines: `fxopt.optimize(module, inputs, "clean,fuse")`
    first gives an engine more to work with.

    Args:
        module: in evaluation mode; captured where it is not yet. It is not changed, and shares nothing with the result.
        inputs: an example: a tensor, a tuple of positional or a dict of keyword arguments.
        engine: its name: `onednn`, `eager`, `inductor`, `onnxruntime`, `openvino`, `sparse`, `cudnn`,
            `cublas`, `cudagraph`.
        options: of the engine; text can hold them too: `openvino{precision=bf16}`.

    Raises:
        SpecError: options in the name that do not fit.
        EngineError: an unknown engine or option, an engine that cannot run here or cannot take the module, a module
            in training mode, or outputs that differ by more than the engine may add.
        CaptureError: see `fxopt.capture`.
    """
    with with_versions():  # as a decorator it would hold the module
        found, example = find(engine, options), Inputs.of(inputs)
        prepared = prepare(found, module, example)
        # Packed weights can take the place of those of a module that nobody else holds, such as the result of a call.
        del module
        collect_beside(prepared)
        return _finished(found, prepared, example)


def build(engine: Engine, module: nn.Module, inputs: Inputs, choices: Any = None) -> Executable:
    """Build for an engine with its options set, by the choices of an earlier build where they are given."""
    return _finished(engine, prepare(engine, module, inputs), inputs, choices)


def after_passes(module: GraphModule, passes: str) -> GraphModule:
    """A copy of a captured module, rewritten by passes of its engine's own.

    Raises:
        EngineError: where they change nothing.
        SpecError, PassError: see there.
    """
    rewritten = cast(GraphModule, independent_copy(module))
    changes = [run_pass(each, rewritten, ())[0] for each in spec.parse(passes)]
    if not any(changes):
        raise EngineError(f"'{passes}' changes nothing in the module, so there is nothing new to build")
    return rewritten


def prepare(engine: Engine, module: nn.Module, inputs: Inputs) -> GraphModule:
    """A graph of the module that shares nothing with it.

    Raises:
        EngineError: where its mode or device is not the engine's.
    """
    training = next((path for path, child in module.named_modules() if child.training), None)
    if training is not None:
        where = f"'{training}'" if training else "the module"
        raise EngineError(f"engine '{engine.name}': {where} is in training mode; call .eval() on the module first")
    tensors = [*module.parameters(), *module.buffers(), *inputs.tensors]
    places = sorted({str(tensor.device) for tensor in tensors})
    types = {torch.device(place).type for place in places}
    if engine.name != "eager" and (len(types) > 1 or not types <= {*engine.devices}):
        devices = " or ".join(map(repr, engine.devices))
        raise EngineError(
            f"engine '{engine.name}' runs on {devices}, but the module and its inputs are on "
            f"{', '.join(places)}: move them with .to('{engine.devices[0]}')"
        )
    if isinstance(module, GraphModule):
        return cast(GraphModule, independent_copy(module))
    return capture(module, inputs).module


def _finished(engine: Engine, prepared: GraphModule, inputs: Inputs, choices: Any = None) -> Executable:
    executable = Executable(engine, prepared, inputs, choices)
    _ = executable.built
    hand_back()
    executable.relative_error = checked(executable, executable, inputs)
    hand_back()
    return executable
