"""What the main job costs: capture, each pass and its verification, as multiples of one eager forward.

    python benchmarks/main_job.py [--out benchmarks/results] [--repeat 5] [MODEL ...]

Models come from torchvision with random weights; every repetition starts from the untouched model. Medians, and
the range from the fastest to the slowest repetition, go into main_job.json and main_job.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxopt import Inputs, bench, capture, spec
from fxopt.pipeline import run_passes
from fxopt.torchvision_operators import declare_missing
from fxopt.verify import Oracle

MODELS = ("resnet18", "resnet50", "mobilenet_v3_large", "convnext_tiny")
PASSES = "clean,fuse,qat"


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of the whole job")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = [measure(name, options.repeat) for name in options.models]
    record = {"machine": dataclasses.asdict(bench.fingerprint()), "passes": PASSES, "models": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "main_job.json").write_text(json.dumps(record, indent=2) + "\n")
    text = render(rows)
    (options.out / "main_job.md").write_text(text)
    print(text)


def measure(name: str, repeat: int) -> dict[str, Any]:
    """Times of one model, in seconds: {stage: {median, low, high}}."""
    model, inputs = build(name)
    seconds: dict[str, list[float]] = {}
    for _ in range(repeat + 1):
        forward(model, inputs)
        note(seconds, "eager forward", timed(lambda: forward(model, inputs))[0])
        took, captured = timed(lambda: capture(model, inputs.args))
        note(seconds, "capture", took)
        took, oracle = timed(lambda: Oracle(model, inputs))
        note(seconds, "run the oracle", took)
        began = time.perf_counter()
        ledger = run_passes(captured, spec.parse(PASSES), oracle)
        whole = time.perf_counter() - began
        for entry in ledger:
            note(seconds, f"pass {entry.pass_name}", entry.seconds)
            note(seconds, f"verify {entry.pass_name}", entry.verify_seconds)
        note(seconds, "passes with verification", whole)
        note(seconds, "capture and passes", seconds["capture"][-1] + sum(entry.seconds for entry in ledger))
    # The first repetition pays for what is done once a process.
    return {
        "model": name,
        "stages": {
            stage: {"median": statistics.median(times[1:]), "low": min(times[1:]), "high": max(times[1:])}
            for stage, times in seconds.items()
        },
    }


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model of torchvision in evaluation mode, and one image."""
    declare_missing()
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None).eval(), Inputs((torch.randn(1, 3, 224, 224),))


def forward(model: nn.Module, inputs: Inputs) -> None:
    """One eager forward without gradients."""
    with torch.no_grad():
        model(*inputs.args)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of a call, and what it returned."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def note(seconds: dict[str, list[float]], stage: str, took: float) -> None:
    """Keep one time."""
    seconds.setdefault(stage, []).append(took)


def render(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: milliseconds of eager, and multiples of it."""
    stages = list(rows[0]["stages"])
    table = []
    for stage in stages:
        cells = [stage]
        for row in rows:
            eager, found = row["stages"]["eager forward"]["median"], row["stages"][stage]
            milliseconds = f"{1e3 * found['median']:.0f} ms"
            cells.append(
                milliseconds if stage == "eager forward" else f"{found['median'] / eager:.1f}x ({milliseconds})"
            )
        table.append(cells)
    head = ["stage", *(row["model"] for row in rows)]
    return (
        "# What the main job costs\n\nMultiples of one eager forward at batch 1, medians of all repetitions "
        f"(`python benchmarks/main_job.py`, passes `{PASSES}`).\n\n"
        + tabulate(table, head, tablefmt="github", disable_numparse=True)
        + "\n"
    )


if __name__ == "__main__":
    main()
