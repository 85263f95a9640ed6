"""What a process pays before it has answered once: imports, building the model, the first call; and its memory.

Run as `python -m fxopt.bench.cold`, it is the fresh process that this is measured in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxopt.bench.memory import resident_bytes
from fxopt.errors import EngineError


@dataclass(frozen=True)
class ColdStart:
    """A fresh process up to its second answer.

    Attributes:
        imports: seconds from the start of the process until Python, torch and fxopt are imported.
        load: seconds that building the model and its inputs takes.
        first_call: seconds of the first call, with moving the model to the device.
        second_call: and of the second, which pays for nothing once.
        resident: bytes of the process that were in memory before the first call; None where not known.
        resident_peak: and at the peak of the calls, with weights, inputs, libraries and Python.
    """

    imports: float
    load: float
    first_call: float
    second_call: float
    resident: int | None
    resident_peak: int | None


def cold_start(
    target: str,
    *,
    inputs: Sequence[str] = (),
    weights: Path | None = None,
    train: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    directory: Path | None = None,
    seconds: float = 300.0,
) -> ColdStart:
    """Start a process that loads a target, as `fxopt.target.load` takes it, and calls it twice.

    It starts in `directory`, or in the current one.

    Raises:
        EngineError: where that process fails, or does not answer within `seconds`.
    """
    order = {
        "target": target,
        "inputs": list(inputs),
        "weights": None if weights is None else str(weights),
        "train": train,
        "device": device,
        "threads": threads,
        "path": list(map(str, sys.path)),
        "started": time.time(),
    }
    try:
        done = subprocess.run(
            # Not what is named as fxopt in that directory.
            [sys.executable, "-P", "-m", "fxopt.bench.cold", json.dumps(order)],
            capture_output=True,
            text=True,
            errors="replace",  # a model prints what it likes
            timeout=seconds,
            cwd=directory,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"the cold start of '{target}' took more than {seconds:.0f} s: nothing is known of it"
        ) from None
    answers = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        said = done.stderr.strip().splitlines()
        raise EngineError(
            f"the cold start of '{target}' failed in a fresh process (exit code {done.returncode}): "
            f"{said[-1] if said else 'it said nothing'}"
        )
    return ColdStart(**json.loads(answers[-1].removeprefix(_MARK)))


_MARK = "fxopt.cold "


def _measure(order: dict[str, Any]) -> ColdStart:
    imports = time.time() - order["started"]
    import torch

    from fxopt.target import load

    sys.path[:] = order["path"]
    began = time.perf_counter()
    if order["threads"] is not None:
        torch.set_num_threads(order["threads"])
    weights = None if order["weights"] is None else Path(order["weights"])
    loaded = load(order["target"], inputs=order["inputs"], weights=weights, train=order["train"])
    built = time.perf_counter()
    if order["threads"] is not None:
        torch.set_num_threads(order["threads"])  # the file may have set others
    resident = resident_bytes()
    _forget_peak()
    calls = []
    with torch.no_grad():
        for _ in range(2):
            start = time.perf_counter()
            module, inputs = loaded.module.to(order["device"]), loaded.inputs.to(order["device"])
            inputs.call(module)
            if order["device"] != "cpu":
                torch.cuda.synchronize(order["device"])
            calls.append(time.perf_counter() - start)
    return ColdStart(imports, built - began, calls[0], calls[1], resident, resident_bytes(peak=True))


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak holds that of loading too
        return


if __name__ == "__main__":
    _found = asdict(_measure(json.loads(sys.argv[1])))
    # Past whatever the user's code left open on stdout.
    os.write(1, f"\n{_MARK}{json.dumps(_found)}\n".encode())
