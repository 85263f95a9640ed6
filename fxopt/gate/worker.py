"""The process that builds and runs one side.

A server imports torch and fxopt once, and forks for each order it gets: a JSON object with the address to connect to.
Each fork loads one side and answers requests until the connection ends; the request "fork" makes a twin of it, which
has loaded and built all that it has. `python -m fxopt.gate.worker` is such a server, with its orders on stdin.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

from fxopt.errors import FxoptError
from fxopt.gate.server import STACK
from fxopt.gate.side import Side
from fxopt.registry import load_own


def listen(lines: Iterable[str]) -> None:
    """Fork for each line, until they end; then end the group of processes that this one leads."""
    if not hasattr(os, "fork"):
        for line in lines:
            serve(json.loads(line))
            return
    # fx makes progress bars, if only hidden ones; their monitor would be a thread, and so the end of forking.
    with contextlib.suppress(ImportError):
        from tqdm import tqdm  # type: ignore[import-untyped]

        tqdm.monitor_interval = 0
    # A collection in a fork would walk, and so copy, all that was imported here.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    for line in lines:
        if os.fork() == 0:
            # A model that asks for input is told that there is none; of the orders it must not read any.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _serve_alone(json.loads(line))
    # Nobody is there any more: the gate was killed. Forks that are busy would not notice for long.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)


def serve(order: dict[str, Any], side: Side | None = None) -> None:
    """Connect, load what is asked for, and answer; a twin comes with its side."""
    connection = Client(order["address"])
    if hasattr(faulthandler, "register"):
        faulthandler.register(STACK, all_threads=False)
    try:
        connection.send_bytes(str(os.getpid()).encode())
        with _answering(connection):
            # Where memory comes to lie changes speed by a percent or two: each process gets another layout.
            padding = [bytearray(size) for size in _sizes(order["seed"])]
            if side is None:
                _move(order)
                side = Side(order)
            connection.send_bytes(json.dumps({"value": None}).encode())
            _answer(connection, side)
            del padding
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(connection: Connection, side: Side) -> None:
    while True:
        request = json.loads(connection.recv_bytes())
        do = request.pop("do")
        value = _fork(connection, side, request) if do == "fork" else getattr(side, do)(**request)
        connection.send_bytes(json.dumps({"value": value}).encode())


def _fork(connection: Connection, side: Side, order: dict[str, Any]) -> bool:
    """Make a twin, which connects to the address of the order; False where that is not sound here."""
    if not side.forkable:
        return False
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if os.fork() == 0:
        connection.close()
        _serve_alone(order, side)
    return True


def _serve_alone(order: dict[str, Any], side: Side | None = None) -> NoReturn:
    """In a fork: serve, and never come back to what the parent was about."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve(order, side)
    finally:
        os._exit(0)


@contextlib.contextmanager
def _answering(connection: Connection) -> Iterator[None]:
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except FxoptError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
        connection.send_bytes(json.dumps(answer).encode())
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}", "kind": "unexpected"}
        connection.send_bytes(json.dumps(answer).encode())


def _move(order: dict[str, Any]) -> None:
    """Go there; what was importable from the other checkout, but for environments in it, is imported from this one."""
    os.chdir(order["directory"])
    environments = [Path(sys.prefix).resolve(), *map(Path, order["kept"])]
    for source, target in order["moved"]:
        for index, entry in enumerate(sys.path):
            path = Path(entry or ".").resolve()
            if path.is_relative_to(source) and not any(map(path.is_relative_to, environments)):
                sys.path[index] = str(Path(target) / path.relative_to(source))
    if order["passes"]:
        load_own()  # while nothing beside the model can be taken for it
    sys.path[:0] = [order["directory"], *(target for _, target in order["moved"])]


def _sizes(seed: int) -> list[int]:
    """Some for the heap, and some that malloc maps by themselves."""
    draw = random.Random(seed)
    small = [draw.randrange(1, 2**16) for _ in range(draw.randrange(1, 64))]
    return small + [draw.randrange(2**20, 2**23) for _ in range(draw.randrange(1, 4))]


if __name__ == "__main__":
    listen(sys.stdin)
