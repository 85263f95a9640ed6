"""Does a rewritten module still compute what the original does?

The original is the oracle. Both run on the example, on fresh random inputs, and on another batch size, from the
same random state; and where a module trains, their gradients are compared too. Differences are relative errors
against a float64 run of the original where that is affordable: `max |y - y*| / max |y*|`, the largest over all
outputs. What a mask is filled with, such as -1e9 beside logits, is no scale for the others.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxopt.bench.memory import available_bytes
from fxopt.capture.blame import advice_on, raised_in
from fxopt.capture.independent import independent_copy
from fxopt.capture.state import State, apart, random_state_kept
from fxopt.contract import Promise
from fxopt.errors import GuardError, LoadError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.outcome import Outcome, difference_of

_AFFORDABLE_SECONDS = 2.0
"""A run that takes longer is not repeated in float64, nor on more inputs than tell something new: one that is random,
and a batch of other size of few rows. Each engine and each pass runs all of them."""
_FEW_ROWS = 2


@dataclass(frozen=True)
class Trial:
    """One input, in words too, and what the original gives for it."""

    what: str
    inputs: Inputs
    expected: Outcome
    reference: Outcome


class Oracle:
    """Runs the original, and compares other modules with it.

    Args:
        module: the original; a copy of it is run, in the mode that it is in.
        inputs: the example.
        seed: of the random inputs and of the random stream that each run starts from.
        fresh: how many random inputs to try beside the example; one where a run takes long.

    Attributes:
        trials: the inputs that the original takes, the example first.

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
        slow = seconds >= _AFFORDABLE_SECONDS
        wide = None if slow else _in_float64(module)
        self.trials: list[Trial] = []
        self._raised: dict[str, None] = {}
        for what, candidate in _candidates(inputs, seed, min(fresh, 1) if slow else fresh, slow):
            expected = example if candidate is inputs else self._attempt(oracle, candidate)
            if isinstance(expected, Exception):
                _, location = raised_in(expected, oracle)
                at = f" at {location}" if location else ""
                self._raised[f"{what}: there the model itself raises {type(expected).__name__}{at}"] = None
            else:
                reference = self._try(wide, candidate.double()) if wide is not None else None
                if reference is None or not _is_rounded(reference, expected):
                    reference = expected
                self.trials.append(Trial(what, candidate, expected, reference))

    def outcomes(self, module: GraphModule) -> list[Outcome | None]:
        """What `module` gives for each trial; None where a guard of its capture refuses the input.

        Where the original gives NaN, as for a query all of whose keys a random mask hides, nothing can be asked, and
        it is NaN here too.
        """
        found = [(trial, self._run_guarded(module, trial.inputs)) for trial in self.trials]
        return [outcome and outcome.with_nan_of(trial.expected) for trial, outcome in found]

    def uncompared(self, outcomes: Sequence[Outcome | None]) -> tuple[str, ...]:
        """Which inputs a captured module could not be held to the original on, and why; `outcomes` are its own."""
        pairs = zip(self.trials, outcomes, strict=True)
        refused = [f"{trial.what}: there a guard of the capture does not hold" for trial, found in pairs if not found]
        return tuple(dict.fromkeys([*self._raised, *refused]))

    def error(self, outcomes: Sequence[Outcome | None], promise: Promise) -> float:
        """Relative error of outputs against the original's, in float64 where that was affordable.

        After a pass that changes outputs it is that of the example alone: random inputs lie outside of the
        ranges that, say, a quantiser was calibrated for.
        """
        pairs = list(zip(self.trials, outcomes, strict=True))[: 1 if promise is Promise.CHANGES else None]
        return max(
            (difference_of(t.reference, found, Promise.CLOSE, widened=True).error for t, found in pairs if found),
            default=0.0,
        )

    def agree_in_float64(self, before: nn.Module, after: nn.Module) -> bool:
        """Whether two modules that differ give the same where both compute in float64.

        They differ by rounding alone then. A deep network in training multiplies it: each activation near zero may fall
        to its other side, and gradients with it.
        """
        wide = [_in_float64(module) for module in (before, after)]
        agreed = False
        for trial in self.trials:
            found = [self._try(module, trial.inputs.double()) for module in wide if module is not None]
            if found == [None, None]:
                continue  # guards refuse the input
            if len(found) < 2 or None in found:
                return False
            left, right = (_narrowed(outcome, trial.expected) for outcome in found if outcome is not None)
            if difference_of(left, right, Promise.CLOSE).is_broken:
                return False
            agreed = True
        return agreed

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
                f"{'' if self._trains else advice_on(error)}"
            ) from error
        if any(_has_nan(value) for value in outcome.values):
            raise LoadError(
                f"the model itself gives NaN for the inputs {inputs.describe()}: nothing can be verified against "
                "that; check its weights, or give other inputs"
            )
        return outcome

    def _try(self, module: nn.Module, inputs: Inputs) -> Outcome | None:
        """None where the original can't take such an input: then nothing is asked of the others."""
        outcome = self._attempt(module, inputs)
        return None if isinstance(outcome, Exception) else outcome

    def _attempt(self, module: nn.Module, inputs: Inputs) -> Outcome | Exception:
        """What a module gives, or whatever a user's forward raises."""
        try:
            with redirect_stderr(io.StringIO()):  # torch.fx prints an error before it raises it
                return self._run(module, inputs)
        except Exception as error:
            return error

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


def _candidates(inputs: Inputs, seed: int, fresh: int, slow: bool) -> Iterator[tuple[str, Inputs]]:
    yield "the example", inputs
    for number in range(fresh):
        yield "random inputs like the example", inputs.fresh(seed + number)
    batch = inputs.batch_size
    if batch:
        rows = _FEW_ROWS if slow and batch > _FEW_ROWS else batch + 1
        other = inputs.fresh(seed + fresh).with_batch(rows)
        if other is not None:
            yield "another batch size", other


def _in_float64(module: nn.Module) -> nn.Module | None:
    """A copy; None where there is no such form, or where it would take half of the memory that is left.

    Linux promises more memory than there is, and ends the process that uses it.
    """
    available = available_bytes()
    if available is not None and 2 * 8 * sum(p.numel() for p in module.parameters() if p.is_cpu) > available:
        return None
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


def _narrowed(wide: Outcome, narrow: Outcome) -> Outcome:
    """A float64 run, to be held to what the module's own dtypes allow: folded weights are rounded to these."""
    gradients = {
        name: gradient.to(narrow.gradients[name].dtype) if name in narrow.gradients else gradient
        for name, gradient in wide.gradients.items()
    }
    return replace(wide, gradients=gradients, dtypes=narrow.dtypes)


def _is_rounded(wide: Outcome, narrow: Outcome) -> bool:
    """Whether a float64 run gives the same but for rounding.

    It may be NaN by itself: a mask of float64's smallest number is minus infinity to a softmax in float32.
    """
    return math.isfinite(difference_of(wide, narrow, Promise.CLOSE, widened=True).error)


def _has_nan(value: Any) -> bool:
    numbers = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return numbers and bool(torch.isnan(value).any())
