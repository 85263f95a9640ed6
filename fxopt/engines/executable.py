"""A module as an engine runs it."""

from __future__ import annotations

import io
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture.signature import static_in
from fxopt.capture.state import random_state_kept, state_kept, with_versions
from fxopt.contract import Skip
from fxopt.engines.checked import checked
from fxopt.engines.contract import ASKED, Built, Engine, Sizes
from fxopt.engines.gpu import current_among
from fxopt.engines.once import once
from fxopt.engines.one_form import OneForm
from fxopt.engines.signature import OtherSizes, Shapes, Signature
from fxopt.errors import ArtifactError, EngineError, GuardError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized, without_rounding
from fxopt.nested import tensors_in
from fxopt.relative_error import relative_error

_ROUNDING = 0.1
"""20 dB: steps of a few values, seen at the outputs, whatever the model's own rounding costs."""
_BUILDING = threading.RLock()
"""Held while an engine builds: torch's exporter and compiler take one thread at a time."""


class Executable(nn.Module):
    """Runs a module by an engine: the same nested inputs, the same nested outputs, no gradients.

    What the engine built (packed weights, sessions, compiled code) is left out of copies, pickles and saved files:
    these hold the plain weights, the example and what was chosen by measuring, and build again when first called.
    Change weights through `load_state_dict`, its own or that of a module that holds it; what is written into them
    otherwise goes unseen. Several threads may call it.

    Args:
        engine: with its options.
        module: captured, in evaluation mode.
        inputs: an example.
        choices: of an earlier build; empty to decide anew.

    Attributes:
        engine: that runs it.
        module: what it runs, with plain weights.
        relative_error: of the outputs for the example against those of the module, where that was measured with the
            weights that it has.
    """

    module: GraphModule
    _signature: Signature
    """Of what was built."""
    _one_form: OneForm
    """Of its calls."""
    _holds_for: set[Shapes]
    """The shapes of inputs that it is known to hold for."""

    def __init__(self, engine: Engine, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any] | None = None):
        super().__init__()
        self.module = module.requires_grad_(False)
        super().train(False)
        self.engine = engine
        self.relative_error: float | None = None
        # A copy: the caller's may be written, need a gradient, or be a row of all the data, which a file would hold.
        inputs = inputs.map(lambda tensor: tensor.detach().clone())
        # One form for all ways to write a call; torch's exporter takes named arguments for positional ones.
        form = OneForm(module.forward)(inputs.args, inputs.kwargs)
        self._inputs = Inputs(*form, static_in(module, inputs.static, *form))
        self._choices = dict(choices or {})
        self._built: Built | None = None
        self._freed: Executable | EngineError | None = None
        self._build_seconds = 0.0
        self._rounding: float | None = None

    @property
    def built(self) -> Built:
        """What the engine made, made now where that is not done yet."""
        with _BUILDING:
            if self._built is None:
                began = time.perf_counter()
                place = current_among(tensor.device for tensor in self._inputs.tensors)
                with with_versions(), torch.no_grad(), state_kept(self.module), random_state_kept(), place:
                    built = self.engine.build(self.module, self._inputs, self._choices)
                self._choices = dict(built.choices)
                self._one_form = OneForm(self.module.forward)
                self._signature = Signature(self.engine.name, self._inputs, built.sizes or self.engine.sizes)
                self._holds_for = {self._signature.shapes}
                self._build_seconds = time.perf_counter() - began
                self._built = built  # last, since calls of other threads look for it
            return self._built

    @property
    def build_seconds(self) -> float:
        """Wall time that the engine took to build, without capture."""
        return self._build_seconds if self.built else 0.0

    @property
    def reasons(self) -> tuple[Skip, ...]:
        """What the engine could not take, so that torch runs it as it is, and why; and what it asks the module."""
        return (*self.built.reasons, ASKED) if self.built.asks else self.built.reasons

    @property
    def choices(self) -> Mapping[str, Any]:
        """What was decided by measuring, as JSON can hold it."""
        return self.built.choices

    @property
    def holds(self) -> tuple[nn.Module, ...]:
        """The modules whose state a call may change: that which it runs, and copies of it that the engine calls."""
        return self.module, *self.built.holds

    @property
    def rounding(self) -> float:
        """The relative error by which a quantised module may differ from itself computed otherwise; else 0.

        On integers, or in another precision, a value between two steps may round to the other one. Where steps are
        few and wide, that is far to go: both are roundings of one model, each at most as far from it as the other.
        """
        if self._rounding is None:
            self._rounding = 0.0
            if is_quantized(self.module):
                with torch.no_grad():
                    rounded = self._outputs()
                    with without_rounding(self.module):
                        exact = self._outputs()
                far = [relative_error(*pair) for pair in zip(rounded, exact, strict=True)]
                self._rounding = max([_ROUNDING, *(2 * each for each in far if each != math.inf)])
        return self._rounding

    def _outputs(self) -> list[torch.Tensor]:
        """The module's tensors for the example."""
        return list(tensors_in(once(self.module, [self.module], self._inputs)[0]))

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the parameters: what its layers compute in, whatever the outputs are cast to."""
        return {parameter.dtype for parameter in self.module.parameters()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run.

        Raises:
            EngineError: for a call that the module does not take, for inputs of another structure, device or dtype, of
                sizes that it was not built for, that require a gradient, or under autocast.
        """
        if self._built is None:
            _ = self.built
        if kwargs or len(args) != len(self._inputs.args):
            try:
                args, kwargs = self._one_form(args, kwargs)
            except TypeError as error:
                raise EngineError(f"engine '{self.engine.name}': the module takes no such call: {error}") from error
        freed = None
        try:
            shapes = self._signature.check(args, kwargs)
        except OtherSizes as refusal:
            freed = self._with_free_sizes(refusal)
        if freed is not None:  # not above, where what it raises would be told as if the refusal had led to it
            return freed(*args, **kwargs)
        if any(map(torch.is_autocast_enabled, self._signature.devices)):
            raise EngineError(
                f"engine '{self.engine.name}' has its precision built in, and autocast would change nothing: call it "
                "outside of autocast, and cast by a pass before lowering"
            )
        try:
            if shapes is not None and shapes not in self._holds_for:
                self._hold(shapes, Inputs(args, kwargs))
            return self.run(*args, **kwargs)
        except GuardError as error:
            raise EngineError(
                f"engine '{self.engine.name}': {error.args[0]}; lower the module again with such inputs"
            ) from error

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call that is known to be in the form of the example."""
        built = self._built or self.built
        if not built.recorded:
            return built.run(*args, **kwargs)
        with torch.no_grad():
            return built.run(*args, **kwargs)

    def _hold(self, shapes: Shapes, given: Inputs) -> None:
        """Make sure that what was built for some sizes holds for others: for a batch size on rows of the example.

        Exporters take a free size for one of two or more, whatever the module makes of one row or of none.
        """
        pairs = zip(itertools.chain(*shapes), itertools.chain(*self._signature.shapes), strict=True)
        is_free = self._signature.sizes is Sizes.FREE
        if self.built.asks or any(size < 2 and size != known for size, known in pairs):
            inputs = given if is_free else self._inputs.with_batch(next(shape[0] for shape in shapes if shape))
            assert inputs is not None
            try:
                with redirect_stderr(io.StringIO()):  # torch.fx prints an error before it raises it
                    checked(self, self.run, inputs)
            except EngineError as error:
                fixed = "".join(f"; {skip.reason}" for skip in self.built.reasons if is_free and not skip.where)
                raise EngineError(
                    f"engine '{self.engine.name}' does not give what the module gives for {inputs.describe()}: lower "
                    f"the module again with such inputs{fixed}"
                ) from error
            except GuardError:
                raise
            except Exception as error:  # whatever its layers raise
                raise EngineError(
                    f"engine '{self.engine.name}': the module itself raises {type(error).__name__} for "
                    f"{inputs.describe()}: {error}"
                ) from error
        self._holds_for.add(shapes)

    def _with_free_sizes(self, refusal: OtherSizes) -> Executable:
        """The same with all sizes free, built by the first call that needs it: no other waits for a second export.

        Raises:
            EngineError: `refusal` where the engine has none, or what it says of this one.
        """
        with _BUILDING:
            freed = self._freed
            if freed is None:
                engine = self.engine.freed() if self._signature.sizes is Sizes.BATCH else None
                if engine is None:
                    raise refusal
                freed = Executable(engine, self.module, self._inputs, self.choices)
                try:
                    checked(freed, freed.run, self._inputs)
                except EngineError as error:
                    freed = error
                self.__dict__["_freed"] = freed  # as a part of this module it would double the state
            if isinstance(freed, EngineError):
                raise EngineError(f"{refusal}, since {freed}") from freed
            return freed

    def train(self, mode: bool = True) -> Executable:
        """Evaluation mode is the only one.

        Raises:
            EngineError: for training mode.
        """
        if mode:
            raise EngineError(
                f"engine '{self.engine.name}' has no gradients, so an executable cannot train: train the module that "
                "it was lowered from, and lower it again"
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Executable:
        """Nothing here takes a gradient.

        Raises:
            EngineError: where one is asked for.
        """
        return self.train(requires_grad)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write `executable.pt`, `engine.json` with what was chosen, and the engine's own form of the model.

        `torch.load("executable.pt", weights_only=False)` gives the executable again, on any machine that has the
        engine; it builds when first called and measures nothing. It is a pickle: load only what you trust.

        Raises:
            ArtifactError: where the directory cannot be written.
        """
        path = Path(directory)
        facts = {"engine": self.engine.name, "choices": self.choices, "inputs": self._inputs.describe()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "engine.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            torch.save(self, path / "executable.pt")
            if self.built.write is not None:
                self.built.write(path)
        except OSError as error:
            raise ArtifactError(
                f"cannot write to '{path}': {error.strerror or error}; choose a directory that is yours"
            ) from error

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Not `load_state_dict`, which is not called where a module around this one loads.
        super()._load_from_state_dict(*args, **kwargs)
        self._built = self._freed = self._rounding = self.relative_error = None

    def extra_repr(self) -> str:
        """The engine with its options."""
        return str(self.engine)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_built": None, "_freed": None, "_choices": dict(self.choices)}
        return {name: value for name, value in state.items() if name not in ("_signature", "_one_form", "_holds_for")}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Executable:
        """What `to`, `half`, `cuda` and their kin call: fine where it changes nothing."""
        tensors = [*self.parameters(), *self.buffers(), *self._inputs.tensors]
        for probe in {(t.dtype, t.device): t.new_empty(0) for t in tensors if t.layout is torch.strided}.values():
            moved = fn(probe)
            if moved.dtype is not probe.dtype or moved.device != probe.device:
                raise EngineError(
                    f"engine '{self.engine.name}' was built for {probe.dtype} on '{probe.device}', not for "
                    f"{moved.dtype} on '{moved.device}': move or cast the module, and lower it again"
                )
        return self
