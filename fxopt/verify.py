"""Does a rewritten module still compute what the original does?

The original is the oracle. Both run on the example, on fresh random inputs, and on another batch size, from the
same random state; and where a module trains, their gradients are compared too. Differences are relative errors
against a float64 run of the original where that is affordable: `max |y - y*| / max |y*|`, the largest over all
outputs. What a mask is filled with, such as -1e9 beside logits, is no scale for the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.capture.blame import raised_in
from fxopt.capture.independent import independent_copy
from fxopt.capture.state import State, apart, random_state_kept
from fxopt.contract import Promise
from fxopt.errors import GuardError, LoadError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
    torch.complex32: 1e-2,
}
"""Relative error that `Promise.CLOSE` allows, by the dtype of the output, or the narrowest that it is computed in."""

_WIDE: frozenset[Any] = frozenset({torch.float64, torch.complex128})
"""What a float64 run gives where the model itself gives fewer bits."""
_AFFORDABLE_SECONDS = 2.0
_GRADIENT_SLACK = 10.0
_GRADIENT_ROUNDING = 32.0
_PIECE = 1 << 18
"""Elements of an output that are compared at a time: 2 MiB in float64."""
_FILL = 1e8
"""From here on, or from half the largest number of its dtype, a value may be what a mask is filled with..."""
_FILL_GAP = 100.0
"""... if all others are smaller by this factor."""
_FILL_SPREAD = 16.0
"""How far values of one such fill lie apart: it may have been added to scores, or twice."""


@dataclass(frozen=True)
class Outcome:
    """What one module gave for one input.

    Attributes:
        values: of the output, flat and in order.
        structure: of the output.
        gradients: by parameter, where the module trains and the output depends on it.
        trainable: the parameters that ask for a gradient, with their shapes.
        dtypes: what the module computes in, whatever its outputs are cast to.
    """

    values: tuple[Any, ...]
    structure: Any
    gradients: Mapping[str, torch.Tensor]
    trainable: Mapping[str, torch.Size]
    dtypes: frozenset[torch.dtype] = frozenset()


@dataclass(frozen=True)
class Difference:
    """How two outcomes differ.

    Attributes:
        error: the largest relative error; infinite where shapes, dtypes or structures differ.
        allowed: the error that is allowed at the tensor that has it.
        what: in words, where the difference is not one of values.
    """

    error: float
    allowed: float
    what: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether it is more than allowed."""
        return not self.error <= self.allowed


@dataclass(frozen=True)
class Trial:
    """One input and what the original gives for it."""

    inputs: Inputs
    expected: Outcome
    reference: Outcome


class Oracle:
    """Runs the original, and compares other modules with it.

    Args:
        module: the original; a copy of it is run, in the mode that it is in.
        inputs: the example.
        seed: of the random inputs and of the random stream that each run starts from.
        fresh: how many random inputs to try beside the example.

    Raises:
        LoadError: the module raises, or gives NaN, on the example.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, seed: int = 0, fresh: int = 2):
        self._seed = seed
        self._trains = module.training
        oracle = independent_copy(module)
        began = time.perf_counter()
        example = self._of_example(oracle, inputs)
        seconds = time.perf_counter() - began
        wide = _in_float64(module) if seconds < _AFFORDABLE_SECONDS else None
        self.trials: list[Trial] = []
        for candidate in _candidates(inputs, seed, fresh):
            expected = example if candidate is inputs else self._try(oracle, candidate)
            if expected is not None:
                reference = self._try(wide, candidate.double()) if wide is not None else None
                if reference is None or not _is_rounded(reference, expected):
                    reference = expected
                self.trials.append(Trial(candidate, expected, reference))

    def outcomes(self, module: GraphModule) -> list[Outcome | None]:
        """What `module` gives for each trial; None where a guard of its capture refuses the input."""
        return [self._run_guarded(module, trial.inputs) for trial in self.trials]

    def error(self, outcomes: Sequence[Outcome | None], promise: Promise) -> float:
        """Relative error of outputs against the original's, in float64 where that was affordable.

        After a pass that changes outputs it is that of the example alone: random inputs lie outside of the
        ranges that, say, a quantiser was calibrated for.
        """
        pairs = list(zip(self.trials, outcomes, strict=True))[: 1 if promise is Promise.CHANGES else None]
        return max(
            (_difference(t.reference, found, Promise.CLOSE, widened=True).error for t, found in pairs if found),
            default=0.0,
        )

    def expected(self) -> list[Outcome | None]:
        """What the original itself gives for each trial."""
        return [trial.expected for trial in self.trials]

    def _of_example(self, oracle: nn.Module, inputs: Inputs) -> Outcome:
        try:
            outcome = self._run(oracle, inputs)
        except Exception as error:
            _, location = raised_in(error, oracle)
            at = f" at {location}" if location else ""
            raise LoadError(
                f"the model itself raises {type(error).__name__}{at} for the inputs {inputs.describe()}: {error}"
            ) from error
        if any(_has_nan(value) for value in outcome.values):
            raise LoadError(
                f"the model itself gives NaN for the inputs {inputs.describe()}: nothing can be verified against "
                "that; check its weights, or give other inputs"
            )
        return outcome

    def _try(self, module: nn.Module, inputs: Inputs) -> Outcome | None:
        """None where the original can't take such an input: then nothing is asked of the others."""
        try:
            return self._run(module, inputs)
        except Exception:  # whatever a user's forward raises
            return None

    def _run_guarded(self, module: nn.Module, inputs: Inputs) -> Outcome | None:
        try:
            return self._run(module, inputs)
        except GuardError:
            return None

    def _run(self, module: nn.Module, inputs: Inputs) -> Outcome:
        state = State(module)
        with random_state_kept(), _gradients_apart(module):
            torch.manual_seed(self._seed)
            given = inputs.map(lambda tensor: tensor.detach().clone())
            try:
                with torch.set_grad_enabled(self._trains):
                    output = module(*given.args, **given.kwargs)
                    values, structure = given.flatten_with(output)
                    gradients = _gradients(module, values) if self._trains else {}
                    found = tuple(apart(values, module))
            finally:
                state.restore()
        trainable = {name: each.shape for name, each in module.named_parameters() if each.requires_grad}
        return Outcome(found, structure, gradients, trainable, _computed_in(module))


def compare_outcomes(before: Sequence[Outcome | None], after: Sequence[Outcome | None], promise: Promise) -> Difference:
    """The worst difference between two modules over all inputs that both took."""
    worst = Difference(0.0, 0.0)
    for left, right in zip(before, after, strict=True):
        if left is None or right is None:
            if left is not None:
                return Difference(float("inf"), 0.0, "it refuses an input that it took before")
            continue
        found = _difference(left, right, promise)
        if found.is_broken or found.error > worst.error:
            worst = found
        if found.is_broken:
            break
    return worst


def _candidates(inputs: Inputs, seed: int, fresh: int) -> Iterator[Inputs]:
    yield inputs
    for number in range(fresh):
        yield inputs.fresh(seed + number)
    batch = inputs.batch_size
    if batch:
        other = inputs.fresh(seed + fresh).with_batch(batch + 1)
        if other is not None:
            yield other


def _in_float64(module: nn.Module) -> nn.Module | None:
    try:
        return independent_copy(module).double()
    except Exception:  # quantized, sparse and scripted modules have no float64 form
        return None


def _computed_in(module: nn.Module) -> frozenset[torch.dtype]:
    """The dtypes of parameters, and of the values in graphs, where autocast may narrow those."""
    graphs = [graph for each in module.modules() if isinstance(each, GraphModule) for graph in each.graphs.values()]
    values = [node.meta.get("tensor_meta") for graph in graphs for node in graph.nodes]
    return frozenset(each.dtype for each in (*module.parameters(), *values) if each is not None)


@contextmanager
def _gradients_apart(module: nn.Module) -> Iterator[None]:
    """Compute gradients without leaving them in the module."""
    before = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _gradients(module: nn.Module, values: Sequence[Any]) -> dict[str, torch.Tensor]:
    outputs = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    if not outputs:
        return {}
    generator = torch.Generator().manual_seed(0)
    # A random projection: the plain sum of a softmax or a normalised output has no gradient.
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device, v.dtype) for v in outputs]
    torch.autograd.backward(outputs, weights)
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def _difference(left: Outcome, right: Outcome, promise: Promise, *, widened: bool = False) -> Difference:
    """The worst difference; `widened` says that `left` was computed in float64 in place of its own dtype."""
    if left.structure != right.structure:
        return Difference(float("inf"), 0.0, f"the output is {right.structure} in place of {left.structure}")
    worst, dtypes = Difference(0.0, 0.0), left.dtypes | right.dtypes
    for index, (expected, found) in enumerate(zip(left.values, right.values, strict=True)):
        what = f"output {index}" if index else "the output"
        difference = _value_difference(expected, found, promise, dtypes, what, widened=widened)
        if difference.is_broken or difference.error > worst.error:
            worst = difference
        if difference.is_broken:
            return worst
    return worst if promise is Promise.CHANGES else _gradient_difference(left, right, widened=widened) or worst


def _is_rounded(wide: Outcome, narrow: Outcome) -> bool:
    """Whether a float64 run gives the same but for rounding.

    It may be NaN by itself: a mask of float64's smallest number is minus infinity to a softmax in float32.
    """
    return math.isfinite(_difference(wide, narrow, Promise.CLOSE, widened=True).error)


def _gradient_difference(left: Outcome, right: Outcome, *, widened: bool) -> Difference | None:
    """The first gradient that is not the same; a rewrite may replace parameters, and these can't be compared."""
    largest, dtypes = max(map(_largest, left.gradients.values()), default=0.0), left.dtypes | right.dtypes
    for name, shape in left.trainable.items():
        if right.trainable.get(name) != shape:
            continue
        both = left.gradients.get(name), right.gradients.get(name)
        expected, found = (None if gradient is None else _dense(gradient) for gradient in both)
        if _is_rounding(expected, found, largest):
            continue
        if expected is None or found is None:
            how = "is missing" if found is None else "is new"
            return Difference(float("inf"), 0.0, f"the gradient of '{name}' {how}")
        what = f"the gradient of '{name}'"
        difference = _value_difference(expected, found, Promise.CLOSE, dtypes, what, widened=widened)
        if difference.error > _GRADIENT_SLACK * difference.allowed:
            return Difference(difference.error, _GRADIENT_SLACK * difference.allowed, difference.what)
    return None


def _is_rounding(expected: torch.Tensor | None, found: torch.Tensor | None, largest: float) -> bool:
    """Whether two gradients are equal but for rounding beside the largest one, as each gradient is summed from those.

    That of a bias before a batch norm is 0 but for that, and of a weight by channel almost so; a missing one is 0.
    """
    given = [gradient for gradient in (expected, found) if gradient is not None]
    if not given or not math.isfinite(largest):
        return not given
    difference = given[0] if len(given) == 1 else given[0] - given[1]
    return _largest(difference) <= _GRADIENT_ROUNDING * max(torch.finfo(g.dtype).eps for g in given) * largest


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _largest(gradient: torch.Tensor) -> float:
    dense = _dense(gradient)
    return dense.abs().max().item() if dense.numel() else 0.0


def _value_difference(
    expected: Any, found: Any, promise: Promise, dtypes: Set[torch.dtype], what: str, *, widened: bool
) -> Difference:
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        same = type(expected) is type(found) and (expected is found or bool(expected == found))
        if widened and expected in _WIDE and isinstance(found, torch.dtype):
            same = True
        if isinstance(expected, float) and isinstance(found, float):
            error = abs(expected - found) / (abs(expected) or 1.0)
            return Difference(error, _allowed(promise, {torch.float32, *dtypes}), what)
        return Difference(0.0 if same else float("inf"), 0.0, f"{what} is {found!r} in place of {expected!r}")
    if expected.shape != found.shape:
        return Difference(float("inf"), 0.0, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    floating = expected.is_floating_point() or expected.is_complex()
    if floating != (found.is_floating_point() or found.is_complex()):
        return Difference(float("inf"), 0.0, f"{what} is {found.dtype} in place of {expected.dtype}")
    if expected.dtype != found.dtype and not (widened and expected.dtype in _WIDE):
        return Difference(float("inf"), 0.0, f"{what} is {found.dtype} in place of {expected.dtype}")
    allowed = _allowed(promise, {found.dtype, *dtypes}) if floating else 0.0
    return Difference(relative_error(expected, found), allowed, what)


def _allowed(promise: Promise, dtypes: Set[torch.dtype]) -> float:
    return 0.0 if promise is Promise.EXACT else max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """`max |found - expected| / max |expected|`; infinite where NaN or infinity differ, 0 for equal or empty.

    Where the largest values are what a mask was filled with, they and the others are each held to their own scale,
    and the larger error counts.
    """
    if expected.layout is not torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    if expected.is_quantized:
        expected, found = expected.dequantize(), found.dequantize()
    if torch.equal(expected, found) or expected.numel() == 0:
        return 0.0
    if expected.shape != found.shape:
        return float("inf")
    scale = worst = 0.0
    for pair in _pieces(expected, found):
        if pair is None:
            return float("inf")
        ours, theirs = pair
        scale = max(scale, ours.abs().max().item())
        worst = max(worst, (theirs - ours).abs().max().item())
    largest = torch.finfo(found.dtype).max if found.is_floating_point() else math.inf
    if scale < min(_FILL, largest / 2):
        return worst / scale if scale else (0.0 if worst == 0 else float("inf"))
    rest_scale = rest_worst = fill_worst = 0.0
    for pair in _pieces(expected, found):
        assert pair is not None
        ours, theirs = pair
        error, rest = (theirs - ours).abs(), ours.abs() < scale / _FILL_SPREAD
        rest_scale = max(rest_scale, ours.masked_fill(~rest, 0).abs().max().item())
        rest_worst = max(rest_worst, error.masked_fill(~rest, 0).max().item())
        fill_worst = max(fill_worst, error.masked_fill(rest, 0).max().item())
    if not 0 < rest_scale < scale / _FILL_GAP:
        return worst / scale
    return max(fill_worst / scale, rest_worst / rest_scale)


def _pieces(expected: torch.Tensor, found: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """Both in wide numbers, with 0 for what is not finite; None where they differ in that.

    In pieces, since the outputs of a language model, as wide as this, take gigabytes.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    bounds = torch.finfo(found.dtype) if found.is_floating_point() else None
    for ours, theirs in zip(expected.reshape(-1).split(_PIECE), found.reshape(-1).split(_PIECE), strict=True):
        ours, theirs = ours.to(wide), theirs.to(wide)
        odd = ~torch.isfinite(ours)
        if not torch.equal(odd, ~torch.isfinite(theirs)) or not torch.equal(
            ours[odd].nan_to_num(), theirs[odd].nan_to_num()
        ):
            yield None
            return
        ours, theirs = ours.masked_fill(odd, 0), theirs.masked_fill(odd, 0)
        # A mask that is filled with the smallest number of its dtype has a smaller one in a float64 run.
        yield (ours.clamp(bounds.min, bounds.max) if bounds is not None else ours), theirs


def _has_nan(value: Any) -> bool:
    numbers = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return numbers and bool(torch.isnan(value).any())
