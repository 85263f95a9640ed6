"""A run on a device that does not exist: every place where tensors of two devices meet, without a GPU.

It runs in a process of its own, forked from this one, because it registers a backend for good and can crash.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import time
import warnings
from dataclasses import dataclass
from typing import Any

from fxopt.findings import Place, Subject

_SECONDS = 30.0


@dataclass(frozen=True)
class Meeting:
    """An operator that was given tensors of two devices.

    Attributes:
        operator: its name.
        place: the user's line.
        module: qualified name.
        made: where the tensor on the CPU was made; None where that was before the forward.
        maker: the operator that made it, or "".
        attribute: `module path, name` where it is an attribute that no module has registered.
        shape: of the tensor on the CPU.
    """

    operator: str
    place: Place | None
    module: str
    made: Place | None
    maker: str
    attribute: tuple[str, str] | None
    shape: tuple[int, ...]


Seen = tuple[list[Meeting], set[tuple[str, str]]]


class FakeDeviceRun:
    """A run that goes on beside others, until its result is asked for.

    Raises:
        RuntimeError: it can't be started here.
    """

    def __init__(self, subject: Subject):
        if not hasattr(os, "fork"):
            raise RuntimeError("this system can't fork a process")
        # Imported here, the child need not do it anew each time.
        from passes.audit.evidence import fake  # noqa: F401

        self._reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forking beside threads; this child uses none of them
            self._child = os.fork()
        if self._child == 0:
            _answer(subject, self._reading, writing)
        os.close(writing)

    def result(self) -> Seen:
        """All meetings of one forward, and the attributes whose tensors it moves by itself.

        Raises:
            RuntimeError: the process crashed, or took too long.
        """
        try:
            seen, error = _received(self._reading, self._child)
        finally:
            self._child = 0
            os.close(self._reading)
        if error:
            raise RuntimeError(error)
        return seen

    def stop(self) -> None:
        """End the process, where nobody asked for its result."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            os.close(self._reading)
            self._child = 0


def _answer(subject: Subject, reading: int, writing: int) -> None:
    """In the child: run, write, and end without running anything that the parent will run at its end."""
    os.close(reading)
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import torch

        torch.set_num_threads(1)
        from passes.audit.evidence.fake import meetings

        answer = meetings(subject)
        data = pickle.dumps(answer)
    except BaseException as error:
        data = pickle.dumps((([], set()), f"{type(error).__name__}: {error}"))
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)


def _received(reading: int, child: int) -> tuple[Seen, str]:
    parts, limit = [], time.monotonic() + _SECONDS
    try:
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                return ([], set()), f"it took more than {_SECONDS:.0f} s"
            part = os.read(reading, 1 << 16)
            if not part:
                break
            parts.append(part)
    finally:
        _, status = os.waitpid(child, 0)
    if not parts:
        return ([], set()), f"the process ended with status {status}"
    answer: Any = pickle.loads(b"".join(parts))
    return answer[0], answer[1]
