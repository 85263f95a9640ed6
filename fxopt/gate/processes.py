"""Processes that build and time the two sides, and the certainty that none outlives the gate."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import FrameType
from typing import IO, Any

from fxopt import errors
from fxopt.errors import BaselineError, GateError, WorkerError

_LONGEST_START = 300.0
"""Seconds that a process may take to import torch before it counts as stuck."""


@dataclass(frozen=True)
class Checkout:
    """Where one side lives.

    Attributes:
        side: "base" or "head".
        label: what messages call it: `base 1a2b3c4`.
        directory: where it runs.
        python: the interpreter of its environment.
        moved: pairs of a directory and the one that stands in for it on the path of imports.
        foreign: no module may come from there.
    """

    side: str
    label: str
    directory: Path
    python: str = sys.executable
    moved: tuple[tuple[Path, Path], ...] = ()
    foreign: Path | None = None


class Worker:
    """A process that has built one side. Close it, or leave its context."""

    def __init__(self, checkout: Checkout, connection: Connection, log: Path):
        self.checkout = checkout
        self._connection = connection
        self._log = log

    def ask(self, do: str, **facts: Any) -> Any:
        """Let the process do something and wait for what it gives.

        Raises:
            FxoptError: that it raised; in the base it is a `BaselineError`, whatever it was.
            WorkerError: where the process died, or fxopt failed in it.
        """
        self._send(json.dumps({"do": do, **facts}).encode())
        return self.answer()

    def answer(self) -> Any:
        """Wait for the next answer."""
        try:
            found = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerError(f"{self.checkout.label}: the process died{self._last_words()}") from error
        if "error" not in found:
            return found["value"]
        kind = getattr(errors, found["kind"], None)
        if kind is None:
            raise WorkerError(f"{self.checkout.label}: unexpected {found['error']}{self._last_words()}")
        if self.checkout.side == "base" and not issubclass(kind, BaselineError):
            raise BaselineError(
                f"{self.checkout.label} has nothing to compare with: {found['error']}; a new target gets its first "
                "comparison once it is in the base"
            )
        raise kind(f"{self.checkout.label}: {found['error']}" if kind is not BaselineError else found["error"])

    def close(self) -> None:
        """End the process."""
        self._connection.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the answer tells of a process that is gone
            self._connection.send_bytes(message)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return f"; it said last: {lines[-1].strip()}" if lines else ""


class Launcher:
    """Starts workers: one process an environment imports torch, and forks for each worker. A context."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fxopt-gate-")
        self._servers: dict[str, subprocess.Popen[str]] = {}
        self._logs: list[IO[str]] = []
        self._count = 0

    @property
    def directory(self) -> Path:
        """For files that processes hand to each other; it goes with the launcher."""
        return Path(self._directory.name)

    def start(self, checkout: Checkout, order: Mapping[str, Any]) -> Worker:
        """A process that has loaded a target; `order` is what `fxopt.gate.side.Side` takes."""
        self._count += 1
        address = str(self.directory / f"{self._count}.socket")
        line = {
            **order,
            "side": checkout.side,
            "address": address,
            "directory": str(checkout.directory),
            "moved": [[str(source), str(target)] for source, target in checkout.moved],
            "foreign": None if checkout.foreign is None else str(checkout.foreign),
            "seed": self._count,
        }
        with Listener(address, family="AF_UNIX") as listener:
            server = self._server(checkout.python)
            assert server.stdin is not None
            try:
                server.stdin.write(json.dumps(line) + "\n")
                server.stdin.flush()
                connection = self._accepted(listener, server)
            except OSError as error:
                raise WorkerError(f"{checkout.label}: '{checkout.python}' does not start: {self._said()}") from error
        worker = Worker(checkout, connection, self._log)
        try:
            worker.answer()
        except BaseException:
            worker.close()
            raise
        return worker

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            assert server.stdin is not None
            server.stdin.close()
        for log in self._logs:
            log.close()
        self._directory.cleanup()

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _said(self) -> str:
        return self._log.read_text(errors="replace").strip()[-500:] or "it said nothing"

    def _server(self, python: str) -> subprocess.Popen[str]:
        server = self._servers.get(python)
        if server is None:
            log = self._log.open("a", encoding="utf-8")
            self._logs.append(log)
            # A session of its own: Ctrl-C reaches the gate alone, which then ends the whole group.
            try:
                server = self._servers[python] = subprocess.Popen(
                    [python, "-m", "fxopt.gate.worker"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            except OSError as error:
                raise GateError(f"'{python}' does not start: {error.strerror}; name an interpreter") from error
        return server

    def _accepted(self, listener: Listener, server: subprocess.Popen[str]) -> Connection:
        """The worker's connection; a server that dies first closes the door."""
        waiting = threading.Event()

        def watch() -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_LONGEST_START)
            if not waiting.is_set():
                listener.close()

        threading.Thread(target=watch, daemon=True).start()
        try:
            return listener.accept()
        finally:
            waiting.set()


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
