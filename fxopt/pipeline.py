"""Runs passes in order: rewrite, clean up behind it, verify, keep the ledger, and name the change that broke it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxopt.capture import Captured, capture
from fxopt.capture.independent import independent_copy
from fxopt.capture.state import State, random_state_kept
from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import FxoptError, PassError, SpecError, VerifyError
from fxopt.graph import GraphModule, Program, eliminate_dead, observe
from fxopt.inputs import Inputs
from fxopt.verify import Difference, Oracle, Outcome, compare_outcomes

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LedgerEntry:
    """What one pass did.

    Attributes:
        pass_name: its name.
        options: its options by name.
        seconds: wall time of the rewrite, without verification.
        changes: what it did.
        skips: what it recognised and left alone.
        promise: what it says of the outputs: "exact", "close" or "changes".
        relative_error: of the outputs against the original's, after this pass.
        verify_seconds: wall time of the verification.
    """

    pass_name: str
    options: dict[str, Any]
    seconds: float
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    promise: str
    relative_error: float | None = None
    verify_seconds: float = 0.0

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.changes)


@dataclass(frozen=True)
class Ledger:
    """All changes and skips of a run, pass by pass."""

    entries: tuple[LedgerEntry, ...]

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self.entries)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Of all passes, in order."""
        return tuple(change for entry in self.entries for change in entry.changes)

    @property
    def skips(self) -> tuple[Skip, ...]:
        """Of all passes, in order."""
        return tuple(skip for entry in self.entries for skip in entry.skips)


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
                rest = [name for name in names if name != earlier]
                rest.insert(rest.index(each.name), earlier)
                raise SpecError(f"'{each.name}' must come after '{earlier}': write {','.join(rest)}")


def run_passes(
    captured: Captured,
    passes: Sequence[Pass],
    oracle: Oracle | None = None,
    calibration: Iterable[Inputs] = (),
    progress: Progress | None = None,
) -> Ledger:
    """Rewrite `captured.module` in place by `passes`, and hold each to its promise.

    Args:
        captured: what to rewrite.
        passes: in this order.
        oracle: knows what the outputs should be; nothing is verified without one.
        calibration: inputs for passes that need data.
        progress: told what begins.

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
    if oracle:
        _check_capture(oracle, outcomes)
    entries = []
    loosest = Promise.EXACT
    for each in passes:
        tell(f"pass {each.name}")
        before = independent_copy(module) if oracle else None
        began = time.perf_counter()
        changes, skips = _run_pass(each, module, batches)
        seconds = time.perf_counter() - began
        error, verify_seconds = None, 0.0
        if oracle and before is not None:
            tell(f"verify {each.name}")
            began = time.perf_counter()
            if changes:
                outcomes = _verified(each, before, module, changes, oracle, outcomes)
            loosest = each.promise if each.promise is Promise.CHANGES and changes else loosest
            error = oracle.error(outcomes, loosest)
            verify_seconds = time.perf_counter() - began
        if changes:
            _propagate_shapes(module, captured.inputs)
        options = {f.name: getattr(each, f.name) for f in dataclasses.fields(each)}  # type: ignore[arg-type]
        promise = each.promise.value
        entries.append(LedgerEntry(each.name, options, seconds, changes, skips, promise, error, verify_seconds))
    return Ledger(tuple(entries))


def replay(module: nn.Module, inputs: Inputs, passes: Sequence[Pass]) -> GraphModule:
    """Capture and rewrite without verifying: what a recipe does that was verified when it was written."""
    captured = capture(module, inputs.args, inputs.kwargs)
    run_passes(captured, passes)
    return captured.module


def _run_pass(
    each: Pass, module: GraphModule, calibration: Sequence[Inputs], limit: int | None = None
) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
    """Run one pass, up to `limit` changes, and tidy up behind it."""
    found: list[Change | Skip] = []
    program = Program(module)
    called, read = _called(program), _read(program)
    try:
        for region in program.regions:
            for item in each.run(region):
                found.append(item)
                if limit is not None and sum(isinstance(one, Change) for one in found) >= limit:
                    break
            eliminate_dead(region)
            region.graph.lint()
    except FxoptError:
        raise
    except Exception as error:
        raise PassError(
            f"{each.name}: failed with {type(error).__name__}: {error}; this is a bug of the pass: nothing was saved"
        ) from error
    _remove_dead_state(program, called, read)
    for region in program.regions:
        region.module.recompile()
    if limit is None:
        found += list(each.finish(module, calibration))
    changes = tuple(item for item in found if isinstance(item, Change))
    return changes, tuple(item for item in found if isinstance(item, Skip))


def _called(program: Program) -> dict[tuple[str, str], nn.Module]:
    return {
        (region.path, str(node.target)): region.submodule(node)
        for region in program.regions
        for node in region.graph.nodes
        if node.op == "call_module"
    }


def _read(program: Program) -> set[tuple[str, str]]:
    return {
        (region.path, str(node.target))
        for region in program.regions
        for node in region.graph.nodes
        if node.op == "get_attr"
    }


def _remove_dead_state(program: Program, called: dict[tuple[str, str], nn.Module], read: set[tuple[str, str]]) -> None:
    """Remove the modules, parameters and buffers whose last use the pass took away."""
    after = Program(program.root)
    owners = {region.path: region.module for region in after.regions}
    for (path, name), module in called.items():
        dead = not after.sites(module) and not after.inside_opaque(module)
        registered = dict(owners[path].named_modules(remove_duplicate=False)).get(name) is module
        if (
            registered
            and dead
            and not any(after.readers(tensor) for tensor in (*module.parameters(), *module.buffers()))
        ):
            owners[path].delete_submodule(name)
    for path, name in read - _read(after):
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = owners[path].get_submodule(owner_name)
        except AttributeError:  # went away with its module
            continue
        tensor = owner._parameters.get(leaf) if leaf in owner._parameters else owner._buffers.get(leaf)
        if isinstance(tensor, torch.Tensor) and not after.readers(tensor) and not after.inside_opaque(owner):
            delattr(owner, leaf)


def _verified(
    each: Pass,
    before: nn.Module,
    module: GraphModule,
    changes: Sequence[Change],
    oracle: Oracle,
    expected: list[Outcome | None],
) -> list[Outcome | None]:
    try:
        outcomes = oracle.outcomes(module)
        difference = compare_outcomes(expected, outcomes, each.promise)
    except Exception as error:  # whatever a broken graph raises
        difference = Difference(float("inf"), 0.0, f"it raises {type(error).__name__}: {error}")
        outcomes = []
    if not difference.is_broken or (each.promise is Promise.CHANGES and outcomes and difference.error != float("inf")):
        return outcomes
    culprit = _first_broken(each, before, len(changes), oracle, expected)
    after = f" after: {culprit.what} '{culprit.where}'" if culprit else ""
    source = f" ({culprit.source})" if culprit and culprit.source else ""
    raise VerifyError(f"{each.name}: {_in_words(difference)}{after}{source}; nothing was saved")


def _in_words(difference: Difference) -> str:
    if difference.error == float("inf"):
        return difference.what
    allowed = f"allowed {difference.allowed:.0e}" if difference.allowed else "promised exactly equal"
    return f"{difference.what} differs from the original by {difference.error:.1e} ({allowed})"


def _first_broken(
    each: Pass, before: nn.Module, count: int, oracle: Oracle, expected: list[Outcome | None]
) -> Change | None:
    """Bisect: the last change of the shortest run of the pass that breaks its promise."""
    low, high, culprit = 1, count, None
    while low <= high:
        middle = (low + high) // 2
        trial = independent_copy(before)
        assert isinstance(trial, GraphModule)
        try:
            changes, _ = _run_pass(each, trial, (), limit=middle)
            broken = compare_outcomes(expected, oracle.outcomes(trial), each.promise).is_broken
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


def _propagate_shapes(module: GraphModule, inputs: Inputs) -> None:
    """Write shape and dtype of each value into the metadata of its node."""

    def visit(_: GraphModule, node: torch.fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)

    state = State(module)
    try:
        with torch.no_grad(), random_state_kept():
            given = inputs.map(lambda tensor: tensor.detach().clone())
            observe(module, given.args, given.kwargs, visit)
    finally:
        state.restore()
