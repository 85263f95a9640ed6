"""The main job: capture, rewrite, verify, measure, and write down what happened."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fxopt import bench, record, spec
from fxopt.batches import several
from fxopt.capture import Captured, capture
from fxopt.capture.state import with_versions
from fxopt.contract import Pass, Promise
from fxopt.engines import Executable, climb
from fxopt.engines.candidates import placed_for
from fxopt.engines.eager import Eager
from fxopt.engines.ladder import check as check_engine
from fxopt.engines.place import place_for
from fxopt.errors import FxoptError, LoadError, SpecError
from fxopt.evaluation import Evaluate, evaluated
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger
from fxopt.pipeline import aimed_at, check_order, run_passes
from fxopt.precision import Precision
from fxopt.prove import Prover, measuring
from fxopt.prove import check as check_proof
from fxopt.revision import Revision
from fxopt.verify import Oracle


@dataclass(frozen=True, repr=False)
class Result:
    """What an optimization gave; `fxopt.report.render(result.record)` tells all of it.

    Attributes:
        module: the rewritten module; independent of the original.
        ledger: what each pass did and left alone.
        record: everything that was found and measured, as plain JSON.
        captured: what capture found.
        passes: the passes that ran.
        inputs: the example inputs.
        executable: the module as the chosen engine runs it; None where none was chosen.
    """

    module: GraphModule
    ledger: Ledger
    record: record.Record
    captured: Captured
    passes: tuple[Pass, ...]
    inputs: Inputs
    executable: Executable | None = None

    def __repr__(self) -> str:
        did = ", ".join(f"{entry.pass_name} {len(entry.changes)}" for entry in self.ledger) or "no passes"
        engine = "" if self.executable is None else f"; run by {self.executable.engine.name}"
        return f"Result({self.record['target']}; changes: {did}{engine}; fxopt.report.render(result.record) tells all)"


@with_versions()
def optimize(
    module: nn.Module,
    inputs: Any,
    passes: Sequence[Pass] | str,
    *,
    devices: Sequence[str] = ("cpu",),
    evaluate: Evaluate | None = None,
    calibration_data: Callable[[], Iterable[Any]] | Iterable[Any] | None = None,
    target: str = "",
    progress: Callable[[str], None] | None = None,
    budget_seconds: float = 10.0,
    seed: int = 0,
    notes: Sequence[str] = (),
    engine: str | None = None,
    engine_seconds: float = 60.0,
    max_error: float | None = None,
    prove: str | None = None,
    prove_seconds: float = 30.0,
    sensitivity: bool = False,
    max_drop: float | None = None,
) -> Result:
    """Optimize a module by passes, each verified against the original, and measure what that gained.

    Args:
        module: the original, in the mode to optimize for. It is unchanged afterwards.
        inputs: an example: a tensor, a tuple of positional or a dict of keyword arguments.
        passes: `[Fuse(), QAT(bits=8)]`, or a spec: `"fuse,qat{bits=8}"`.
        devices: where to measure latency, nowhere for `()`; a device that is not there is reported as not measured.
        evaluate: gives named floats for a module, before and after.
        calibration_data: batches of inputs for passes that need them, or a function that gives them.
        target: what the report calls the model.
        progress: told what begins.
        budget_seconds: about how long to measure on each device.
        seed: of everything random.
        notes: to keep in the record.
        engine: the name of an engine to lower the result for; "auto" for the fastest, "all" to show them all. None
            lowers nothing. It is built on the first of `devices` that is there and that it runs on.
        engine_seconds: about how long to build and measure engines.
        max_error: the relative error of outputs that an engine may have; None for what each dtype allows.
        prove: "pass" to measure each pass for speed against the module before it, on the first of `devices` that is
            there and by `engine` where one is named, and to take it back unless it is faster; "match" to do so with
            each place that it changed. None keeps all of it.
        prove_seconds: about how long to measure for one pass.
        sensitivity: rank the layers that a pass quantised by what each costs alone, on the calibration data.
        max_drop: the share of the original's accuracy, as `evaluate` tells it, that quantising may lose; the costliest
            layers stay floats so that it holds. None quantises all.

    Raises:
        EngineError: an engine that can't be used, see `fxopt.lower`.
        LoadError: inputs that the model can't take, or for which it gives NaN.
        CaptureError, SpecError, PassError, VerifyError: see there.
    """
    tell = progress or (lambda stage: None)
    example = Inputs.of(inputs)
    aim = None if engine is None else placed_for(engine, place_for(engine, devices, example))
    pipeline = aimed_at(aim, _pipeline(passes))
    check_order(pipeline)
    _check_wishes(pipeline, engine, max_error, prove, sensitivity, max_drop)
    tell("run the original")
    oracle = Oracle(module, example, seed)
    tell("capture")
    captured = capture(module, example)
    captured = dataclasses.replace(captured, notes=(*notes, *captured.notes))
    revisions = list[Revision]()
    if prove is not None:
        place = place_for(engine or Eager.name, devices, example)
        revisions.append(Prover(measuring(example, place, engine, seed), prove, prove_seconds, tell))
    if sensitivity or max_drop is not None:
        accuracy = None if evaluate is None else partial(evaluated, evaluate)
        revisions.append(Precision(accuracy, module, max_drop, tell))
    ledger = run_passes(captured, pipeline, oracle, _batches(calibration_data), tell, revisions)
    result = captured.module
    ladder = None
    if engine is not None:
        changed = any(entry.promise == Promise.CHANGES.value and entry.changes for entry in ledger)
        ladder = climb(
            engine,
            module,
            result,
            example,
            device=place_for(engine, devices, example),
            oracle=None if changed else oracle,
            max_error=max_error,
            budget_seconds=engine_seconds,
            seed=seed,
            progress=tell,
        )
    metrics = None
    if evaluate is not None:
        tell("evaluate")
        metrics = bench.BeforeAfter[Mapping[str, float]](evaluated(evaluate, module), evaluated(evaluate, result))
    latency: dict[str, bench.Comparison | str] = {}
    for device in devices:
        tell(f"measure on {device}")
        latency |= bench.compare_on(device, module, result, example, budget_seconds=budget_seconds, seed=seed)
    written = record.build(
        target=target or type(module).__name__,
        inputs=example,
        machine=bench.fingerprint(),
        captured=captured,
        ledger=ledger,
        verified=True,
        latency=latency,
        memory=bench.BeforeAfter(bench.measure_size(module, example), bench.measure_size(result, example)),
        metrics=metrics,
        engines=ladder,
    )
    executable = ladder.chosen.executable if ladder is not None and ladder.chosen is not None else None
    return Result(result, ledger, written, captured, pipeline, example, executable)


def _pipeline(passes: Any) -> Sequence[Pass]:
    """The passes of a spec, or those given.

    Raises:
        SpecError: for anything else.
    """
    if isinstance(passes, str):
        return spec.parse(passes)
    is_listed = isinstance(passes, Iterable)
    pipeline = tuple(passes) if is_listed else (passes,)
    wrong = [each for each in pipeline if not (is_listed and isinstance(each, Pass))]
    if wrong:
        raise SpecError(
            "passes: expected a list of passes, such as [Fuse(), QAT(bits=8)], or a spec, such as 'fuse,qat{bits=8}', "
            f"not {wrong[0]!r}"
        )
    return pipeline


def _check_wishes(
    pipeline: Sequence[Pass],
    engine: str | None,
    max_error: float | None,
    prove: str | None,
    sensitivity: bool,
    max_drop: float | None,
) -> None:
    """Refuse what can't be had, and what would have no effect, before much work is put into the rest.

    Raises:
        EngineError, SpecError: see `optimize`.
    """
    if max_error is not None and not max_error >= 0:
        raise SpecError(f"max_error: expected 0 or more, not {max_error}")
    if engine is not None:
        check_engine(engine)
    elif max_error is not None:
        raise SpecError(
            "max_error: it is for engines, and none is asked for; give one, such as `auto`, or leave it out"
        )
    if (sensitivity or max_drop is not None) and not any(each.quantizes for each in pipeline):
        name = "sensitivity" if sensitivity else "max_drop"
        raise SpecError(f"{name}: it goes with a pass that quantises, and there is none; add one, such as `fuse,ptq`")
    if prove is not None:
        check_proof(prove)


def _batches(data: Callable[[], Iterable[Any]] | Iterable[Any] | None) -> list[Inputs]:
    if data is None:
        return []
    try:
        batches = data() if callable(data) else data
        return [Inputs.of(batch) for batch in several("calibration_data", batches)]
    except FxoptError:
        raise
    except Exception as error:
        raise LoadError(f"calibration_data raises {type(error).__name__}: {error}") from error
