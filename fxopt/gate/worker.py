"""The process that builds and runs one side.

`python -m fxopt.gate.worker` imports torch and fxopt once, and then forks for each line on its stdin: a JSON object
with the address to connect to. Each fork builds one side and answers requests until the connection ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from fxopt.errors import FxoptError
from fxopt.gate.side import Side


def main() -> None:
    """Fork for each line on stdin, until it ends."""
    children = hasattr(os, "fork")
    for line in sys.stdin:
        order = json.loads(line)
        if not children:
            serve(order)
            return
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.close(0)
            serve(order)
            os._exit(0)


def serve(order: dict[str, Any]) -> None:
    """Connect, build what is asked for, and answer."""
    connection = Client(order["address"])
    try:
        with _answering(connection):
            _move(Path(order["directory"]), order["moved"])
            # Where memory comes to lie changes speed by a percent or two: each process gets another layout.
            padding = [bytearray(size) for size in _sizes(order["seed"])]
            side = Side(order)
            connection.send_bytes(json.dumps({"value": None}).encode())
            with side:
                while True:
                    request = json.loads(connection.recv_bytes())
                    value = getattr(side, request.pop("do"))(**request)
                    connection.send_bytes(json.dumps({"value": value}).encode())
            del padding
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


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


def _move(directory: Path, moved: list[list[str]]) -> None:
    """Go there; what was importable from the other checkout is imported from this one."""
    os.chdir(directory)
    for source, target in moved:
        for index, entry in enumerate(sys.path):
            path = Path(entry or ".").resolve()
            if path.is_relative_to(source) and not path.is_relative_to(sys.prefix):
                sys.path[index] = str(Path(target) / path.relative_to(source))
        sys.path.insert(0, target)
    sys.path.insert(0, str(directory))
    gc.collect()


def _sizes(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 2**16) for _ in range(draw.randrange(1, 64))]


if __name__ == "__main__":
    main()
