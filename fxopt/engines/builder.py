"""What a ladder does with one engine: builds it, and holds it to what the outputs should be."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fxopt.bench.memory import resident_bytes
from fxopt.contract import Skip
from fxopt.engines.candidates import Rung
from fxopt.engines.contract import Engine
from fxopt.engines.executable import Executable
from fxopt.engines.exports import Exports
from fxopt.engines.gpu import rounding_of_torch
from fxopt.engines.lower import after_passes, build
from fxopt.engines.once import once
from fxopt.engines.parity import agreement
from fxopt.engines.table import find
from fxopt.engines.unquantized import unquantized
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized
from fxopt.relative_error import TOLERANCE, apart_by_rounding, relative_error
from fxopt.verify import Oracle, Trial

_LOWEST_BFLOAT16_ERROR = 1e-3
"""bfloat16 keeps 8 bits: no model stays closer than this, so a tighter bound rules it out before it is built."""


@dataclass(frozen=True)
class Builder:
    """Builds the engines of a ladder.

    Attributes:
        module: what they run, on the device.
        inputs: an example, there too.
        device: where engines run.
        oracle: knows what the outputs should be.
        seed: of random inputs for a quantised module in floats.
        max_error: the largest relative error of outputs; None for what each dtype allows.
        named: whether an engine was asked for by its name: then fewer bits need not gain anything.
        exports: ONNX files, which engines share.
    """

    module: GraphModule
    inputs: Inputs
    device: torch.device
    oracle: Oracle
    seed: int
    max_error: float | None
    named: bool
    exports: Exports

    @cached_property
    def _in_floats(self) -> tuple[GraphModule, Oracle]:
        module = unquantized(self.module)
        return module, Oracle(module, self.inputs, self.seed)

    def build(self, rung: Rung) -> Rung:
        """The rung with what was built and how far it is off, or why it dropped out."""
        max_error = rung.options.get("max_error", self.max_error)  # its own goes first
        lowest = 0.0 if "tf32" in rung.options else _LOWEST_BFLOAT16_ERROR
        if rung.is_rounded and not rung.in_floats and (max_error is None or max_error < lowest):
            return dataclasses.replace(
                rung, dropped="not built: fewer bits need a bound on the error: give a max_error, such as 1e-2"
            )
        module, oracle = self._in_floats if rung.in_floats else (self.module, self.oracle)
        before, began = _held_bytes(self.device), time.perf_counter()
        try:
            rewritten = after_passes(module, rung.passes) if rung.passes else module
            seconds = time.perf_counter() - began
            engine = find(rung.engine, rung.options)
            in_vain = engine.in_vain(rewritten) if rung.is_rounded and (rung.in_floats or not self.named) else None
            if in_vain is not None:
                return dataclasses.replace(rung, dropped=f"not built: {in_vain}")
            with self.exports.after(rung.beforehand):
                executable = build(engine if max_error is None else engine.within(max_error), rewritten, self.inputs)
            errors = self._errors(executable, oracle)
        except EngineError as error:
            return dataclasses.replace(rung, dropped=str(error))
        except Exception as error:  # whatever the insides of another project raise
            return dataclasses.replace(rung, dropped=f"{type(error).__name__}: {error}")
        after = _held_bytes(self.device)
        found = dataclasses.replace(
            rung,
            executable=executable,
            build_seconds=seconds + executable.build_seconds,
            relative_error=max((error for error, _, _ in errors), default=0.0),
            resident_bytes=None if before is None or after is None else max(after - before, 0),
        )
        dropped = _too_far_off(found, errors, engine, max_error)
        if dropped:
            return dataclasses.replace(found, dropped=dropped)
        if engine.integers and is_quantized(rewritten):
            return dataclasses.replace(found, parity=(self._parity(found, executable, oracle),))
        return found

    def _errors(self, executable: Executable, oracle: Oracle) -> list[tuple[float, float, int]]:
        """The relative error of each output over the trials, what its dtype allows, and which output it is.

        The largest error comes first.
        """
        rounding = max(executable.rounding, rounding_of_torch(self.device))
        found = []
        for trial, values in self._outputs(executable, oracle):
            results = zip(trial.reference.values, trial.expected.values, values, strict=True)
            for index, (expected, rounded, value) in enumerate(results):
                if isinstance(expected, torch.Tensor):
                    error = relative_error(expected, value.to(expected.device))
                    allowed = (TOLERANCE.get(dtype, 0.0) for dtype in {value.dtype, *executable.dtypes})
                    found.append((error, max(rounding, apart_by_rounding(expected, rounded), *allowed), index))
        return sorted(found, reverse=True)

    def _parity(self, rung: Rung, executable: Executable, oracle: Oracle) -> Skip:
        """How the outputs of integers agree with those that are simulated."""
        size = None if executable.built.write is None else self.exports.size(rung.beforehand)
        pairs = [
            pair
            for trial, values in self._outputs(executable, oracle)
            for pair in zip(trial.expected.values, values, strict=True)
        ]
        return agreement(pairs, size)

    def _outputs(self, executable: Executable, oracle: Oracle) -> Iterator[tuple[Trial, list[Any]]]:
        """The trials that it takes, and what it gives for each."""
        for index, trial in enumerate(oracle.trials):
            try:
                values, structure = once(executable, executable.holds, trial.inputs.to(self.device))
            except EngineError:
                if index == 0:
                    raise
                continue  # sizes that it was not built for
            if structure != trial.expected.structure:
                raise EngineError(f"engine '{executable.engine.name}' gives outputs that are nested otherwise")
            yield trial, values


def _too_far_off(rung: Rung, errors: list[tuple[float, float, int]], engine: Engine, max_error: float | None) -> str:
    """Which output breaks its bound, in words; empty where none does."""
    for error, allowed, index in errors:
        bound = allowed if max_error is None else max_error
        if rung.in_floats:  # it is shown, and never chosen
            bound = max(bound, engine.tolerance(torch.float32))
        if not error <= bound:
            return f"output {index} differs by {error:.2e} (allowed {bound:g})"
    return ""


def _held_bytes(device: torch.device) -> int | None:
    """Bytes of this process that are in the memory of a device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
