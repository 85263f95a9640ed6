"""Processes that build and time the two sides, and the certainty that none outlives the gate."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from fxopt import errors
from fxopt.errors import BaselineError, MissingError, NewTargetError, WorkerError
from fxopt.gate.server import STACK, Server, forked, started

_LOOK = 0.5
"""Seconds between two looks whether a server still lives."""
_LONGEST_START = 300.0
"""Seconds that a process may take to import torch before it counts as stuck."""
_LONGEST_ANSWER = 1800.0
"""And to load its side, or to do what it is asked for."""
_LONGEST_LOOK = 5.0
"""And to write its stack, where it is stuck."""
_LONGEST_PLACE = 90
"""Bytes of a directory for sockets: macOS takes 103 of a whole path, Linux 107."""


@dataclass(frozen=True)
class Checkout:
    """Where one side lives.

    Attributes:
        side: "base" or "head".
        label: what messages call it: `base 1a2b3c4`.
        directory: where it runs.
        python: the interpreter of its environment.
        moved: pairs of a directory and the one that stands in for it on the path of imports.
        foreign: no module may come from there,
        kept: but from these, which are environments in it.
    """

    side: str
    label: str
    directory: Path
    python: str = sys.executable
    moved: tuple[tuple[Path, Path], ...] = ()
    foreign: Path | None = None
    kept: tuple[Path, ...] = ()


class Worker:
    """A process that has loaded one side. Close it, or leave its context.

    Attributes:
        checkout: where its side lives.
        order: what it was started with.
        prepared: what it was asked to do since, as far as that makes it what it is.
    """

    def __init__(self, checkout: Checkout, order: Mapping[str, Any], connection: Connection, log: Path):
        self.checkout = checkout
        self.order = order
        self.prepared: list[dict[str, Any]] = []
        self._connection = connection
        self._pid = int(connection.recv_bytes())
        self._busy = True  # it loads its side
        self._log = log

    def ask(self, do: str, **facts: Any) -> Any:
        """Let the process do something and wait for what it gives.

        Raises:
            FxoptError: that it raised; in the base it is a `BaselineError`, whatever it was.
            WorkerError: where the process died, or fxopt failed in it.
        """
        self.begin(do, **facts)
        return self.answer()

    def prepare(self, do: str, **facts: Any) -> None:
        """Let the process do something that its twins will have done, too."""
        prepare_all([self], do, **facts)

    def begin(self, do: str, **facts: Any) -> None:
        """Let the process do something; `answer` waits for what it gives."""
        self._busy = True
        with contextlib.suppress(OSError):  # the answer tells of a process that is gone
            self._connection.send_bytes(json.dumps({"do": do, **facts}).encode())

    def answer(self) -> Any:
        """Wait for the next answer."""
        try:
            if not self._connection.poll(_LONGEST_ANSWER):
                raise WorkerError(f"{self.checkout.label}: no answer in {_LONGEST_ANSWER:.0f} s{self._stuck()}")
            found = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            self._busy = False
            raise WorkerError(f"{self.checkout.label}: the process died{self._last_words()}") from error
        self._busy = False
        if "error" not in found:
            return found["value"]
        kind = getattr(errors, found["kind"], None)
        if kind is None:
            raise WorkerError(f"{self.checkout.label}: unexpected {found['error']}{self._last_words()}")
        if self.checkout.side == "base" and issubclass(kind, MissingError):
            raise NewTargetError(
                f"{self.checkout.label} does not have it yet: {found['error']}; a new target gets its first comparison "
                "once it is in the base"
            )
        if self.checkout.side == "base" and not issubclass(kind, BaselineError):
            raise BaselineError(
                f"{self.checkout.label} has nothing to compare with: {found['error']}; for a target that is broken "
                "there name an earlier revision by --base"
            )
        raise kind(f"{self.checkout.label}: {found['error']}" if kind is not BaselineError else found["error"])

    def close(self) -> None:
        """End the process, whatever it is about; one that waits for a request ends by itself."""
        if self._busy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._connection.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _stuck(self) -> str:
        """Where the process is now, by the line of its checkout that it is in, or by the innermost."""
        before = len(self._said())
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, STACK)
        until = time.monotonic() + _LONGEST_LOOK
        frames: list[tuple[str, str]] = []
        while not frames and time.monotonic() < until:
            time.sleep(0.1)
            frames = re.findall(r'File "(.+)", line (\d+) in', self._said()[before:])
        within = [frame for frame in frames if Path(frame[0]).is_relative_to(self.checkout.directory)]
        return "".join(f"; it is stuck at {file}:{line}" for file, line in (within or frames)[:1])

    def _last_words(self) -> str:
        lines = self._said().strip().splitlines()
        return f"; it said last: {lines[-1].strip()}" if lines else ""

    def _said(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def prepare_all(workers: Collection[Worker], do: str, **facts: Any) -> None:
    """`Worker.prepare` for several at once."""
    for worker in workers:
        worker.begin(do, **facts)
    for worker in workers:
        worker.answer()
        worker.prepared.append({"do": do, **facts})


class Launcher:
    """Starts workers: one server an environment imports torch, and forks for each worker. A context.

    Args:
        fork: make the server of this environment out of this process, which has imported all that it needs. Sound only
            where no thread runs yet and no user's code was loaded.
    """

    def __init__(self, *, fork: bool = False) -> None:
        prefix = f"fxopt-gate-{os.getpid()}-"
        self._directory = self._doors = tempfile.TemporaryDirectory(prefix=prefix)
        if len(os.fsencode(self._directory.name)) > _LONGEST_PLACE:
            self._doors = tempfile.TemporaryDirectory(prefix=prefix, dir="/tmp")
        self._servers: dict[str, Server] = {}
        self._count = 0
        if fork and hasattr(os, "fork") and threading.active_count() == 1:
            self._servers[sys.executable] = forked(self._log)

    @property
    def directory(self) -> Path:
        """For files that processes hand to each other; it goes with the launcher."""
        return Path(self._directory.name)

    def start(self, *sides: tuple[Checkout, Mapping[str, Any]]) -> list[Worker]:
        """Processes that have loaded a target, all at once; an order is what `fxopt.gate.side.Side` takes."""
        found: list[Worker] = []
        with contextlib.ExitStack() as stack, contextlib.ExitStack() as open_doors:
            doors = [open_doors.enter_context(self._door()) for _ in sides]
            for (checkout, order), door in zip(sides, doors, strict=True):
                line = {
                    **order,
                    "side": checkout.side,
                    "address": door.getsockname(),
                    "directory": str(checkout.directory),
                    "moved": [[str(source), str(target)] for source, target in checkout.moved],
                    "foreign": None if checkout.foreign is None else str(checkout.foreign),
                    "kept": list(map(str, checkout.kept)),
                    "seed": self._count,
                }
                server = self._server(checkout.python)
                try:
                    server.orders.write(json.dumps(line) + "\n")
                    server.orders.flush()
                    worker = Worker(checkout, order, _accepted(door, server), self._log)
                except (OSError, EOFError) as error:
                    raise WorkerError(
                        f"{checkout.label}: '{checkout.python}' does not start: {self._said()}"
                    ) from error
                found.append(worker)
                stack.callback(worker.close)
            for worker in found:
                worker.answer()
            stack.pop_all()
        return found

    def twin(self, worker: Worker) -> Worker:
        """Another process that is as far as this one: a fork of it where that is sound, else one from the start."""
        with self._door() as door:
            forks = worker.ask("fork", address=door.getsockname(), seed=self._count)
            if forks:
                connection = _accepted(door, self._server(worker.checkout.python))
        with contextlib.ExitStack() as stack:
            if forks:
                twin = Worker(worker.checkout, worker.order, connection, self._log)
                stack.callback(twin.close)
                twin.answer()
                twin.prepared = list(worker.prepared)
            else:
                (twin,) = self.start((worker.checkout, worker.order))
                stack.callback(twin.close)
                for request in worker.prepared:
                    twin.prepare(**request)
            stack.pop_all()
        return twin

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            server.end()
        self._doors.cleanup()
        self._directory.cleanup()

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _said(self) -> str:
        return self._log.read_text(errors="replace").strip()[-500:] or "it said nothing"

    def _door(self) -> socket.socket:
        """Where the next process connects."""
        self._count += 1
        door = socket.socket(socket.AF_UNIX)
        door.bind(str(Path(self._doors.name) / f"{self._count}.socket"))
        door.listen(1)
        return door

    def _server(self, python: str) -> Server:
        if python not in self._servers:
            self._servers[python] = started(python, self._log)
        return self._servers[python]


def _accepted(door: socket.socket, server: Server) -> Connection:
    """The connection of a process; OSError where its server dies first."""
    door.settimeout(_LOOK)
    until = time.monotonic() + _LONGEST_START
    while time.monotonic() < until:
        with contextlib.suppress(TimeoutError):
            connected, _ = door.accept()
            connected.setblocking(True)
            return Connection(connected.detach())
        if not server.alive:
            break
    raise OSError("nothing connects")


@contextlib.contextmanager
def stopping_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack, as Ctrl-C does, so that whatever was made is taken away again."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
