"""ONNX files for engines that read them; those of one ladder share theirs, since an export takes as long as a build."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from fxopt.contract import Skip
from fxopt.engines.contract import Sizes
from fxopt.engines.onnx import Free, Outputs, export
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Exported:
    """A module as ONNX.

    Attributes:
        path: of the file; what lies beside it belongs to it.
        reasons: see `Export`.
        fixed: see `Export`.
        asks: see `Export`.
        free: which sizes were to be free.
    """

    path: Path
    reasons: tuple[Skip, ...]
    fixed: bool
    asks: bool
    free: Free

    @property
    def sizes(self) -> Sizes:
        """Which sizes of the inputs may differ from those of the example."""
        if self.free == "all":
            return Sizes.FREE
        return Sizes.FIXED if self.fixed else Sizes.BATCH


class Exports:
    """The files of one module, kept on the disk for as long as this is entered."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fxopt-")
        self._made: dict[tuple[str, Free], Exported | EngineError] = {}

    def __enter__(self) -> Exports:
        return self

    def __exit__(self, *raised: object) -> None:
        self._directory.cleanup()

    @contextlib.contextmanager
    def after(self, passes: str) -> Iterator[None]:
        """What engines export within is the module after `passes`, whichever copy of it they have."""
        token = _shared.set((self, passes))
        try:
            yield
        finally:
            _shared.reset(token)

    def get(self, passes: str, module: GraphModule, inputs: Inputs, outputs: Outputs, free: Free) -> Exported:
        """The module after `passes`, exported now where it is not yet.

        Raises:
            EngineError: where torch cannot export it, with its reason.
        """
        key = passes, free
        if key not in self._made:
            directory = Path(self._directory.name) / str(len(self._made))
            directory.mkdir()
            try:
                found = export(module, inputs, outputs, free)
                found.program.save(directory / "model.onnx")
                self._made[key] = Exported(directory / "model.onnx", found.reasons, found.fixed, found.asks, free)
            except EngineError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, EngineError):
            raise made
        return made

    def size(self, passes: str) -> int | None:
        """Bytes of the file of the module after `passes`; None where there is none."""
        made = next((made for (of, _), made in self._made.items() if of == passes), None)
        return sum(file.stat().st_size for file in made.path.parent.iterdir()) if isinstance(made, Exported) else None


@contextlib.contextmanager
def exported(engine: str, module: GraphModule, inputs: Inputs, outputs: Outputs, free: Free) -> Iterator[Exported]:
    """The module as a file.

    Raises:
        EngineError: where torch cannot export it, with its reason.
    """
    with contextlib.ExitStack() as held:
        exports, passes = _shared.get() or (held.enter_context(Exports()), "")
        try:
            found = exports.get(passes, module, inputs, outputs, free)
        except EngineError as error:
            raise EngineError(f"engine '{engine}' needs an ONNX model, and {error}") from error.__cause__
        yield found


_shared: ContextVar[tuple[Exports, str] | None] = ContextVar("shared", default=None)
