"""Runs passes in order: rewrite, clean up behind it, verify, keep the ledger, and name the change that broke it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence, Set
from typing import cast

from torch import nn

from fxopt.capture import Captured, capture
from fxopt.capture.independent import independent_copy
from fxopt.contract import Change, Pass, Promise
from fxopt.errors import SpecError, VerifyError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger, LedgerEntry
from fxopt.modules import FakeQuantize
from fxopt.outcome import Difference, Outcome, compare_outcomes
from fxopt.revision import Kept, Revision
from fxopt.rewriting import propagate_shapes, run_pass
from fxopt.verify import Oracle

Progress = Callable[[str], None]


def check_order(passes: Sequence[Pass]) -> None:
    """Hold a pipeline to what its passes declare of their order.

    Raises:
        SpecError: naming the two passes, and the order that would do.
    """
    names = [each.name for each in passes]
    for position, each in enumerate(passes):
        for other in each.conflicts:
            if other in names:
                raise SpecError(f"'{each.name}' and '{other}' can't be in one pipeline; leave one of them out")
        for earlier in each.after:
            if earlier in names[position + 1 :]:
                raise SpecError(f"'{each.name}' must come after '{earlier}': write {','.join(_ordered(passes))}")


def aimed_at(engine: str | None, passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """Passes with what their options leave to the engine that will run the result, such as `openvino{precision=bf16}`.

    What is no target of theirs leaves them as they are.
    """
    name = (engine or "").partition("{")[0].strip()
    return tuple(each.aimed_at(name) for each in passes)


def _ordered(passes: Sequence[Pass]) -> list[str]:
    """The names of passes, each as early as what it declares lets it be."""
    left, names = list(passes), list[str]()
    while left:
        waiting = {each.name for each in left}
        found = next((each for each in left if waiting.isdisjoint(each.after)), left[0])
        left.remove(found)
        names.append(found.name)
    return names


def run_passes(
    captured: Captured,
    passes: Sequence[Pass],
    oracle: Oracle | None = None,
    calibration: Iterable[Inputs] = (),
    progress: Progress | None = None,
    revisions: Sequence[Revision] = (),
) -> Ledger:
    """Rewrite `captured.module` in place by `passes`, and hold each to its promise.

    Args:
        captured: what to rewrite.
        passes: in this order.
        oracle: knows what the outputs should be; nothing is verified without one.
        calibration: inputs for passes that need data.
        progress: told what begins.
        revisions: take back some of what a pass did, in this order; all is kept without one.

    Raises:
        SpecError: the order of the passes is wrong.
        VerifyError: a pass broke its promise; the message names the change that did it.
        PassError: a pass could not do its work.
    """
    check_order(passes)
    tell = progress or (lambda stage: None)
    module = captured.module
    batches = list(calibration)
    outcomes = oracle.outcomes(module) if oracle else []
    uncompared: tuple[str, ...] = ()
    if oracle:
        _check_capture(oracle, outcomes)
        uncompared = oracle.uncompared(outcomes)
    entries = []
    resizes = oracle is not None and _resizes(captured)
    loosest = Promise.EXACT
    for each in passes:
        tell(f"pass {each.name}")
        before = cast(GraphModule, independent_copy(module)) if oracle or revisions else module
        began = time.perf_counter()
        done = Kept(module, *run_pass(each, module, batches))
        seconds = time.perf_counter() - began
        began, expected = time.perf_counter(), outcomes
        if oracle and done.changes:
            tell(f"verify {each.name}")
            outcomes = _verified(each, before, done, oracle, expected, resizes)
            _check_bound(each, oracle.error(outcomes, _looser(loosest, each)))
        verify_seconds = time.perf_counter() - began
        for revision in revisions:
            if done.changes and revision.concerns(each):
                done = revision.revise(each, before, done, batches)
        if done.module is not module:
            if oracle:
                outcomes = _verified(each, before, done, oracle, expected, resizes) if done.changes else expected
            module.become(done.module)
        if done.changes:
            loosest = _looser(loosest, each)
            propagate_shapes(module, captured.inputs)
        entries.append(
            LedgerEntry(
                each.name,
                options={f.name: getattr(each, f.name) for f in dataclasses.fields(each)},  # type: ignore[arg-type]
                seconds=seconds,
                changes=done.changes,
                skips=done.skips,
                promise=each.promise.value,
                relative_error=oracle.error(outcomes, loosest) if oracle else None,
                verify_seconds=verify_seconds,
                proofs=done.proofs,
                ranking=done.ranking,
                spared=done.spared,
            )
        )
    return Ledger(tuple(entries), uncompared)


def replay(
    module: nn.Module,
    inputs: Inputs,
    passes: Sequence[Pass],
    spared: Sequence[Set[str]] = (),
    calibration: Sequence[Inputs] | None = None,
    ranged: Set[str] | None = None,
) -> GraphModule:
    """Capture and rewrite without verifying: what a recipe does that was verified when it was written.

    Args:
        module: the original.
        inputs: to capture it with.
        passes: in order.
        spared: for each pass the places that it leaves alone; empty where none leaves any.
        calibration: inputs for passes that need data; `inputs` where it is None.
        ranged: the quantisers that have a range, which is to be restored, whichever `calibration` reaches; None leaves
            that to it.
    """
    captured = capture(module, inputs)
    check_order(passes)
    # A copy, since a model may write into its inputs.
    batches = [inputs.map(lambda tensor: tensor.detach().clone())] if calibration is None else calibration
    for each, places in zip(passes, spared or [frozenset()] * len(passes), strict=True):
        changes, _ = run_pass(each, captured.module, batches, spared=places)
        for name, child in captured.module.named_modules():
            if ranged is not None and isinstance(child, FakeQuantize):
                if name in ranged:
                    child.ready = True
                else:
                    child.reset()
        if changes:
            propagate_shapes(captured.module, captured.inputs)
    return captured.module


def _looser(promise: Promise, each: Pass) -> Promise:
    return each.promise if each.promise is Promise.CHANGES else promise


def _check_bound(each: Pass, error: float) -> None:
    if each.bound is not None and not error <= each.bound:
        raise VerifyError(
            f"{each.name}: the outputs differ from the original by {error:.1e} (allowed {each.bound:.0e}); "
            "nothing was saved"
        )


def _verified(
    each: Pass, before: nn.Module, done: Kept, oracle: Oracle, expected: list[Outcome | None], resizes: bool
) -> list[Outcome | None]:
    try:
        outcomes = oracle.outcomes(done.module)
        difference = compare_outcomes(expected, outcomes, each.promise, resizes=resizes)
    except Exception as error:  # whatever a broken graph raises
        difference = Difference(float("inf"), 0.0, f"it raises {type(error).__name__}: {error}")
        outcomes = []
    if not difference.is_broken:
        return outcomes
    rounding = each.promise is Promise.CLOSE and outcomes and difference.error != float("inf")
    if rounding and oracle.agree_in_float64(before, done.module):
        return outcomes
    culprit = _first_broken(each, before, done, oracle, expected, resizes)
    after = f" after: {culprit.what} '{culprit.where}'" if culprit else ""
    source = f" ({culprit.source})" if culprit and culprit.source else ""
    raise VerifyError(f"{each.name}: {_in_words(difference)}{after}{source}; nothing was saved")


def _resizes(captured: Captured) -> bool:
    """Whether values may decide on sizes: graphs note where they do, and code that no graph holds may do anything."""
    nodes = (node for region in Program(captured.module).regions for node in region.graph.nodes)
    return bool(captured.opaque) or any("sized_by_values" in node.meta for node in nodes)


def _in_words(difference: Difference) -> str:
    if difference.error == float("inf"):
        return difference.what
    allowed = f"allowed {difference.allowed:.0e}" if difference.allowed else "promised exactly equal"
    return f"{difference.what} differs from the original by {difference.error:.1e} ({allowed})"


def _first_broken(
    each: Pass, before: nn.Module, done: Kept, oracle: Oracle, expected: list[Outcome | None], resizes: bool
) -> Change | None:
    """Bisect: the last change of the shortest run of the pass that breaks its promise."""
    low, high, culprit = 1, len(done.changes), None
    while low <= high:
        middle = (low + high) // 2
        changes: tuple[Change, ...] = ()
        trial = independent_copy(before)
        assert isinstance(trial, GraphModule)
        try:
            changes, _ = run_pass(each, trial, (), limit=middle, spared=done.spared)
            broken = compare_outcomes(expected, oracle.outcomes(trial), each.promise, resizes=resizes).is_broken
        except Exception:  # a graph that can't run is a broken one
            broken = True
        if broken:
            culprit = changes[-1] if changes else culprit
            high = middle - 1
        else:
            low = middle + 1
    return culprit


def _check_capture(oracle: Oracle, outcomes: list[Outcome | None]) -> None:
    difference = compare_outcomes(oracle.expected(), _but_guarded(oracle, outcomes), Promise.CLOSE)
    if difference.is_broken:
        raise VerifyError(f"capture: {_in_words(difference)}; please report it with the model: nothing was saved")


def _but_guarded(oracle: Oracle, outcomes: list[Outcome | None]) -> list[Outcome | None]:
    """A guard may refuse an input that the original takes: that is what it is for."""
    return [found or trial.expected for trial, found in zip(oracle.trials, outcomes, strict=True)]
