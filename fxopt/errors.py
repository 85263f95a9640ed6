"""Everything that fxopt raises on purpose.

    FxoptError
    ├── LoadError        a target, its inputs or its weights, or a list of known findings, cannot be read
    │   └── MissingError the target is not there
    ├── CaptureError     a module cannot be captured at all
    ├── GuardError       a captured module was called outside what capture assumed
    ├── SpecError        the text of a pipeline is wrong: an unknown pass or option, a bad value
    ├── PassError        a pass cannot do what was asked
    │   └── VerifyError  a pass broke its promise
    ├── EngineError      an engine cannot take or run a graph
    ├── ArtifactError    a result cannot be written or read back
    ├── GateError        a gate was set up wrongly: an unknown revision, a bad setting
    │   └── WorkerError  a process that measures died, or fxopt in it failed
    └── BaselineError    two measurements cannot be compared
        └── NewTargetError  the base does not have the target yet

Each message says what happened, where, what was expected and what to do next. `exit_code` is what the
command line returns: 2 where the call was wrong, 1 where a promise or a check failed, 5 where there is nothing to
compare with; a gate has codes of its own for what it finds.
"""

from __future__ import annotations

from typing import ClassVar


class FxoptError(Exception):
    """Base of all errors that fxopt raises on purpose."""

    exit_code: ClassVar[int] = 2


class LoadError(FxoptError):
    """A target, its inputs or its weights, or a list of known findings, cannot be read."""


class MissingError(LoadError):
    """There is no such file, no such module, or no such name in it."""


class CaptureError(FxoptError):
    """A module cannot be captured."""


class GuardError(FxoptError):
    """A captured module was called with inputs outside of what its capture assumed.

    Its first argument says what was assumed and what is there, the second what to do next.
    """

    def __str__(self) -> str:
        return "; ".join(self.args)


class SpecError(FxoptError):
    """The text of a pipeline is wrong."""


class PassError(FxoptError):
    """A pass cannot do what was asked of it."""


class VerifyError(PassError):
    """A pass broke its promise: the rewritten module is not what it should be."""

    exit_code: ClassVar[int] = 1


class EngineError(FxoptError):
    """An engine cannot take or run a graph."""


class ArtifactError(FxoptError):
    """A result cannot be written or read back."""


class GateError(FxoptError):
    """A gate was set up wrongly."""


class WorkerError(GateError):
    """A process that measures one side of a gate failed."""

    exit_code: ClassVar[int] = 1


class BaselineError(FxoptError):
    """Two measurements cannot be compared."""

    exit_code: ClassVar[int] = 5


class NewTargetError(BaselineError):
    """The base does not have the target yet."""
