"""A target: the module, its inputs, and what else its file gives."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.batches import several
from fxopt.capture.state import modes_kept
from fxopt.errors import LoadError
from fxopt.inputs import Inputs
from fxopt.target.find import find
from fxopt.target.inputs import find_inputs
from fxopt.target.source import Source, open_source, same_randomness, split
from fxopt.target.weights import load_weights
from fxopt.torchvision_operators import declare_missing


@dataclass(frozen=True)
class Target:
    """What there is to optimize.

    Attributes:
        name: what the command line calls it, `model.py:Net`.
        module: the model.
        inputs: what to capture, verify and measure it with.
        evaluate: the file's `evaluate(module) -> dict of floats`, where it has one.
        calibration_data: the file's calibration inputs, anew at each iteration, where it has them.
        notes: what was chosen for the user, with the way to choose otherwise.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    calibration_data: Iterable[Any] | None = None
    notes: tuple[str, ...] = ()


def load(target: str, *, inputs: Sequence[str] = (), weights: Path | None = None, train: bool = False) -> Target:
    """Load `model.py`, `model.py:Name`, `package.module` or `package.module:name`.

    The random state of the process is as before afterwards; what lies beside the file, in the current directory, and
    where the file itself lets Python look, stays importable.

    Args:
        target: where the model is; `fxopt.target.find` says which one is taken where it is not named.
        inputs: as `--input` takes them; where empty, `example_inputs` of the file, or a guess.
        weights: a file of weights to load into the module.
        train: keep the mode in which the file left the module; else it is put into evaluation mode.

    Raises:
        LoadError: where anything of it is missing, ambiguous or broken; the message says what to type instead.
    """
    place, name = split(target)
    declare_missing()
    here = Path.cwd()
    with same_randomness():
        _importable(here)  # `model.py` may lie in a package below
        source = open_source(place)
        _importable(source.directory)  # for what a forward imports while it runs
        found = find(source, name)
        notes = found.notes + (() if train else _in_evaluation(found.module))
        if weights is not None and Path.cwd() != here:  # the file went elsewhere while it was imported
            weights = here / weights
        notes += load_weights(found.module, weights) if weights is not None else ()
        given, input_notes = find_inputs(source, found.name, found.module, inputs)
        notes += (*input_notes, *_materialized(found.module, given))
    return Target(
        name=f"{place}:{name}" if name else place,
        module=found.module,
        inputs=given,
        evaluate=_evaluate(source),
        calibration_data=_calibration_data(source),
        notes=notes,
    )


def _importable(directory: Path) -> None:
    """Behind all else."""
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _in_evaluation(module: nn.Module) -> tuple[str, ...]:
    try:
        module.eval()
    except NotImplementedError as error:  # of what torch.export gives, which is in one mode for good
        return (f"the module stays in the mode that it is in: {error}",)
    return ()


def _materialized(module: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Give lazy parameters their shapes by one forward, and say so; where it fails, whoever runs the model tells."""
    lazy = [name for name, parameter in module.named_parameters() if is_lazy(parameter)]
    if not lazy:
        return ()
    try:
        with modes_kept(module), torch.no_grad():
            inputs.call(module.eval())
    except Exception:  # whatever the user's forward raises
        return ()
    return (f"lazy parameters got the shapes that the inputs ask for: {', '.join(lazy)}",)


def _evaluate(source: Source) -> Callable[[nn.Module], dict[str, float]] | None:
    function = getattr(source.namespace, "evaluate", None)
    if function is None:
        return None
    if not callable(function):
        raise LoadError(f"'evaluate' of '{source.label}' is a {type(function).__name__}: expected evaluate(module)")
    return _Evaluate(source, function)


@dataclass(frozen=True)
class _Evaluate:
    """The user's `evaluate`, with its errors and its result made sure of."""

    source: Source
    function: Callable[[nn.Module], Any]

    def __call__(self, module: nn.Module) -> dict[str, float]:
        with self.source.running("'evaluate(module)' failed"):
            result = self.function(module)
        if not isinstance(result, Mapping):
            raise LoadError(
                f"'evaluate' of '{self.source.label}' returned a {type(result).__name__}: expected a dict of "
                "floats, such as {'accuracy': 0.98}"
            )
        return {str(name): self._number(name, value) for name, value in result.items()}

    def _number(self, name: Any, value: Any) -> float:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise LoadError(
                f"'evaluate' of '{self.source.label}' gave '{name}' as a {type(value).__name__}: expected a float"
            )
        return float(value)


def _calibration_data(source: Source) -> Iterable[Any] | None:
    data = getattr(source.namespace, "calibration_data", None)
    if data is None:
        return None
    if not callable(data) and not isinstance(data, Iterable):
        raise LoadError(
            f"'calibration_data' of '{source.label}' is a {type(data).__name__}: expected a function or an iterable"
        )
    return _CalibrationData(source, data)


@dataclass(frozen=True)
class _CalibrationData:
    """The user's calibration inputs; a function is called anew for each iteration."""

    source: Source
    data: Callable[[], Iterable[Any]] | Iterable[Any]

    def __iter__(self) -> Iterator[Any]:
        doing = "'calibration_data' failed"
        with self.source.running(doing):
            items = iter(several("calibration_data", self.data() if callable(self.data) else self.data))
        end = object()
        while True:
            with self.source.running(doing):
                item = next(items, end)
            if item is end:
                return
            yield item
