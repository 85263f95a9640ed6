"""The process that imports torch once and forks for each worker: a new interpreter, or a fork of this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fxopt.errors import GateError

_BRIEF = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
"""How long threads of GNU's and of LLVM's OpenMP spin for more work, in turns of a loop and in ms. The first is 0.15
ms, longer than from one operator to the next. With more, the next side would wait for up to 9 ms, and where other work
takes a core from one thread, all others would spin for the whole of its time slice."""
STACK = getattr(signal, "SIGUSR1", signal.SIGTERM)
"""The signal at which a worker writes to its log where it is; without such a one it ends."""


@dataclass
class Server:
    """A process in a session of its own: Ctrl-C reaches the gate alone, which then ends the whole group.

    Attributes:
        pid: of the process, and of its group.
        orders: a line for each worker.
        process: the same, where it is a new interpreter.
        ended: whether it was seen to have ended.
    """

    pid: int
    orders: IO[str]
    process: subprocess.Popen[str] | None = None
    ended: bool = False

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        self._look(os.WNOHANG)
        return not self.ended

    def end(self) -> None:
        """End it and all that it has forked."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._look(0)
        with contextlib.suppress(BrokenPipeError):
            self.orders.close()

    def _look(self, how: int) -> None:
        if self.process is not None:
            self.ended = (self.process.poll() if how else self.process.wait()) is not None
        elif not self.ended:
            self.ended = os.waitpid(self.pid, how)[0] != 0


def started(python: str, log: Path) -> Server:
    """A new interpreter, whose threads spin briefly unless the environment says how they wait.

    Raises:
        GateError: where there is none of that name.
    """
    said_by_user = {*_BRIEF, "OMP_WAIT_POLICY"} & os.environ.keys()
    with log.open("a", encoding="utf-8") as said:
        try:
            process = subprocess.Popen(
                [python, "-P", "-m", "fxopt.gate.worker"],  # not what is named as fxopt in the current directory
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                text=True,
                env=os.environ if said_by_user else {**os.environ, **_BRIEF},
                start_new_session=True,
            )
        except OSError as error:
            raise GateError(f"'{python}' does not start: {error.strerror}; name an interpreter") from error
    assert process.stdin is not None
    return Server(process.pid, process.stdin, process)


def forked(log: Path) -> Server:
    """A fork of this process, which need not import anything; its threads will spin as long as this one's."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(reading)
        return Server(pid, os.fdopen(writing, "w"))
    try:
        os.setsid()
        os.close(writing)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((reading, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        os.close(reading)
        os.close(said)
        from fxopt.gate.worker import listen

        with open(0, encoding="utf-8", closefd=False) as orders:
            listen(orders)
    finally:
        os._exit(0)
