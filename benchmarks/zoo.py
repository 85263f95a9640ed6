"""Captures the zoo: every model that torchvision has, a timm model of each family, transformers of each type.

All are built by plain constructors with random weights. For each one it tells whether the captured module
computes exactly what the original does, at the captured sizes and at others, how much of it is in the graph,
and what capturing cost.

    python benchmarks/zoo.py --library timm --only swin
    python benchmarks/zoo.py --out benchmarks/results/zoo.json
    python benchmarks/zoo.py --out benchmarks/results/zoo.json --again
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing.connection
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from zoo_models import from_timm, from_torch, from_torchvision, from_transformers
from zoo_models.check import check
from zoo_models.specimen import Specimen
from zoo_models.table import summary, table

from fxopt.bench import fingerprint

LIBRARIES: dict[str, Callable[[], Iterator[Specimen]]] = {
    "torch": from_torch.specimens,
    "torchvision": from_torchvision.specimens,
    "timm": from_timm.specimens,
    "transformers": from_transformers.specimens,
}
SMALL = frozenset(
    "LSTM GRU TransformerEncoder resnet18 mobilenet_v3_small squeezenet1_1 raft_small ghostnet nest levit "
    "bert gpt2 llama t5 vit mixtral mamba whisper".split()
)
MEMORY = 16 << 30


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, help="only this one")
    parser.add_argument("--only", default="", metavar="A,B", help="only models with one of these in their names")
    parser.add_argument("--small", action="store_true", help="only a dozen small models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record here, and a table beside it")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (default: 2)")
    parser.add_argument("--timeout", type=float, default=150.0, metavar="SECONDS", help="for one model (default: 150)")
    parser.add_argument(
        "--again",
        action="store_true",
        help="only what the record in --out does not have, or has as failed, not run or partly opaque; keep the rest",
    )
    options = parser.parse_args()
    known = {} if options.out is None or not options.again else read(options.out)
    chosen = [
        specimen
        for name, specimens in LIBRARIES.items()
        if options.library in (None, name)
        for specimen in specimens()
        if any(part in specimen.name for part in options.only.split(","))
        and (not options.small or specimen.name in SMALL)
    ]
    order = {(specimen.library, specimen.name): index for index, specimen in enumerate(chosen)}
    known = {key: result for key, result in known.items() if key not in order or is_settled(result)}
    chosen = [specimen for specimen in chosen if (specimen.library, specimen.name) not in known]
    # A run that is cut short has seen models of all kinds.
    random.Random(0).shuffle(chosen)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    results: list[dict[str, Any]] = list(known.values())
    for result in _run_all(chosen, options.jobs, options.timeout):
        results.append(result | {"commit": commit})
        print(_line(result), flush=True)
        if options.out is not None:
            write(options.out, sorted(results, key=_place))
    print("\n" + summary(results))
    return 1 if any(result["status"] in ("failed", "differs", "timeout") for result in results) else 0


def _place(result: dict[str, Any]) -> tuple[int, str, str]:
    return list(LIBRARIES).index(result["library"]), result["kind"], result["name"]


def read(record: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a record says of each model, by library and name; nothing where there is none."""
    if not record.exists():
        return {}
    return {(result["library"], result["name"]): result for result in json.loads(record.read_text())["models"]}


def is_settled(result: dict[str, Any]) -> bool:
    """Whether there is nothing to gain from running a model again."""
    return result["status"] == "exact" and not result["opaque"]


def write(out: Path, results: list[dict[str, Any]]) -> None:
    """Write the record as JSON, and as a table beside it."""
    record = {"machine": dataclasses.asdict(fingerprint()), "models": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results))


def _line(result: dict[str, Any]) -> str:
    about = result.get("error") or "; ".join(
        f"{part['path'] or 'the module'}: {part['reason']} ({part['location']})" for part in result.get("opaque", ())
    )
    sizes = " ".join(f"{name}:{answer}" for name, answer in result.get("sizes", {}).items() if answer != "exact")
    seconds = result.get("capture_seconds", 0.0)
    return f"{result['status']:<10} {result['library']}/{result['name']} {seconds:.1f}s {sizes} {about}"[:600]


def _run_all(specimens: list[Specimen], jobs: int, timeout: float) -> Iterator[dict[str, Any]]:
    """Each in a process of its own, so that none can take the others down."""
    context = multiprocessing.get_context("fork")
    # What is there before the fork is shared, and the collector would copy it.
    gc.freeze()
    waiting = list(reversed(specimens))
    running: list[tuple[Specimen, Any, Any, float]] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            specimen = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(specimen, theirs, int(timeout)))
            process.start()
            theirs.close()
            running.append((specimen, process, ours, time.monotonic()))
        multiprocessing.connection.wait([ours for _, _, ours, _ in running], timeout=1.0)
        for item in list(running):
            specimen, process, ours, began = item
            late = time.monotonic() - began > 10 * timeout
            if not (ours.poll() or late or not process.is_alive()):
                continue
            facts = {"library": specimen.library, "name": specimen.name, "kind": specimen.kind}
            try:
                answer = ours.recv() if ours.poll() else {"status": "timeout" if late else "failed"}
            except EOFError:
                answer = {"status": "failed", "error": "its process ended"}
            process.kill() if late else None
            process.join()
            if process.exitcode == -signal.SIGXCPU:
                answer = {"status": "timeout"}
            running.remove(item)
            yield facts | answer


def _work(specimen: Specimen, pipe: Any, seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        pipe.send(check(specimen))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        pipe.send({"status": "failed", "error": message[:400]})


if __name__ == "__main__":
    sys.exit(main())
