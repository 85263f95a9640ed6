"""How often protocols see a slow-down that is not there, and miss one that is.

    python benchmarks/protocols.py [--windows 100] [--cells 1:on 1:off 2:on 2:off] [--budget 70] [--out DIR]

A small residual network of about 2 ms a call is held against itself (A/A) and against itself with more work, a matrix
product as large as 5 or 10 % of its time. A cell is a number of threads, with other work on the machine on and off in
turns of random length or without any. A window is what one comparison gets: up to three times three rounds, each with
new processes of five sides, the base, its two copies and the two slower models, timed in turns. Every rule then judges
the same times. Times are lines of protocols.raw.jsonl as they come, so a run that was stopped, by --budget or
otherwise, goes on where it was; what the rules say of them is written to protocols.json and protocols.md each time.
Then the command itself is timed; `--windows 0` times it alone, beside the verdicts of the last run.

`fxopt ci` judges as it does with `--budget 6`: by its own code, window after window, until it would stop. The peers'
rules get all calls that it gets at most: pytest-benchmark's compare holds the mean of a run against that of an earlier
one, here against the base of the window before; asv times one side after the other and asks for Mann-Whitney
p < 0.002 beside the ratio; for torch.utils.benchmark the medians of one block after the other are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, mannwhitneyu
from tabulate import tabulate

from fxopt.bench import fingerprint
from fxopt.bench.timer import SHORTEST_SAMPLE
from fxopt.gate.processes import Checkout, Launcher, Worker
from fxopt.gate.verdict import judge_windows, wants_another
from fxopt.gate.window import Round, Window, is_tight, shared_core, take_window

CASES = {"A/A": (0.0, 0.05), "+10 %": (0.10, 0.05), "+5 %": (0.05, 0.03)}
"""The true slow-down, and the threshold that it is held to."""
SIDES = ("base", "again", *CASES)
PROTOCOLS = ("fxopt ci", "pytest-benchmark compare", "asv", "torch.utils.benchmark medians")
PARTS, ROUNDS = 3, 3
PART_SECONDS = 3.3
"""For five sides what two seconds are for the three of `fxopt ci`."""

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
    def forward(self, x):
        return torch.relu(x + self.two(torch.relu(self.one(x))))

class Net(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(32) for _ in range(SIZE[0])))
        self.register_buffer("left", torch.randn(rows, 64))
        self.register_buffer("right", torch.randn(64, 64))
        self.register_buffer("product", torch.empty(rows, 64))
    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x)))
        x = x + 0 * torch.mm(self.left, self.right, out=self.product)[0, 0]
        return x.mean((2, 3))

SIZE = {size}
torch.manual_seed(0)
model = Net({rows})
example_inputs = torch.randn(1, 3, SIZE[1], SIZE[1])
"""
SMALL, LARGE = (2, 40), (3, 56)
"""Blocks and width of the picture, for about 2 and 5 ms."""

BUSY = """
import random, sys, time
draw = random.Random(int(sys.argv[1]))
while True:
    until = time.monotonic() + draw.uniform(0.2, 3)
    while time.monotonic() < until:
        sum(range(2000))
    time.sleep(draw.uniform(0.2, 6))
"""


def main() -> None:
    """Collect what is not collected yet, and write what the rules say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100, help="of each cell")
    parser.add_argument("--cells", nargs="+", default=["1:on", "1:off", "2:on", "2:off"], help="threads and other work")
    parser.add_argument("--budget", type=float, default=math.inf, help="minutes to collect")
    parser.add_argument("--commands", type=int, default=5, help="how often to time `fxopt ci` on a model of 5 ms")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    raw, until = options.out / "protocols.raw.jsonl", time.monotonic() + 60 * options.budget
    done = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(Launcher())
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxopt-protocols-")))
        templates: dict[int, dict[str, Worker]] = {}
        # All cells take turns, so that the hours of the day hit them alike.
        for number in range(options.windows):
            for cell in options.cells:
                key = {"cell": cell, "window": number}
                if any(key.items() <= one.items() for one in done) or time.monotonic() > until:
                    continue
                threads = int(cell.partition(":")[0])
                if threads not in templates:
                    templates[threads] = sides(launcher, root, threads)
                with load(cell.endswith(":on"), number):
                    found = key | collect(launcher, templates[threads], seed=number)
                done.append(found)
                with raw.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(key, verdicts(found, None), f"{found['seconds']:.1f} s", flush=True)
        commands = [command(root) for _ in range(options.commands)]
    kept = options.out / "protocols.json"
    if not done and not kept.exists():
        sys.exit("nothing was collected, and there is no protocols.json of an earlier run")
    record = judged(done) if done else json.loads(kept.read_text())
    record |= {"commands": commands, "commands_cpu": asdict(fingerprint())["cpu"]}
    kept.write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "protocols.md").write_text(render(record))
    print(render(record))


def model(root: Path, size: tuple[int, int], rows: int) -> Path:
    """A directory with the model in it."""
    directory = root / f"{size[0]}-{rows}"
    directory.mkdir(exist_ok=True)
    (directory / "model.py").write_text(MODEL.replace("{size}", str(size)).replace("{rows}", str(rows)))
    return directory


def sides(launcher: Launcher, root: Path, threads: int) -> dict[str, Worker]:
    """A process of each side; those that are timed are twins of it."""

    def built(rows: int) -> Worker:
        order: dict[str, Any] = {"target": "model.py", "inputs": [], "weights": None, "passes": "", "engine": ""}
        (worker,) = launcher.start(
            (Checkout("head", str(rows), model(root, SMALL, rows)), order | {"device": "cpu", "threads": threads})
        )
        worker.prepare("build")
        return worker

    base, many = built(1), 2000
    with built(many) as probe:
        starts = {"base": functools.partial(launcher.twin, base), "head": functools.partial(launcher.twin, probe)}
        cost = (take_window(starts, budget=10, tight=0.005).effect.ratio - 1) / many
    rows = {case: round(slower / cost) for case, (slower, _) in CASES.items()}
    print(f"{threads} threads: a row takes {100 * cost:.4f} % of a call: {rows}", flush=True)
    return {"base": base, "again": base, **{case: built(1 + rows[case]) if rows[case] else base for case in CASES}}


@contextlib.contextmanager
def load(on: bool, seed: int) -> Iterator[None]:
    """Other work on the machine, on and off."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(seed)]) if on else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def collect(launcher: Launcher, templates: Mapping[str, Worker], seed: int) -> dict[str, Any]:
    """The times of one window: as many parts as any case still wants."""
    began, draw = time.perf_counter(), random.Random(seed)
    parts: list[list[dict[str, list[float]]]] = []
    found: dict[str, Any] = {"parts": parts, "cpu": asdict(fingerprint())["cpu"]}
    while not parts or (
        len(parts) < PARTS and any(wants_another(gate_windows(found, case), CASES[case][1]) for case in CASES)
    ):
        parts.append([taken(launcher, templates, draw) for _ in range(ROUNDS)])
    return found | {"seconds": round(time.perf_counter() - began, 2)}


def taken(launcher: Launcher, templates: Mapping[str, Worker], draw: random.Random) -> dict[str, list[float]]:
    """One round: new processes, timed in turns as `fxopt.gate.window` does it."""
    names, until = list(SIDES), math.inf
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        draw.shuffle(names)
        workers = {name: stack.enter_context(launcher.twin(templates[name])) for name in names}
        core = shared_core(workers.values(), draw)
        for worker in workers.values():
            worker.ask("warm", cores=core)
        shortest = min(worker.ask("time", calls=1)["seconds"] for worker in workers.values())
        calls, until = max(1, math.ceil(SHORTEST_SAMPLE / shortest)), time.perf_counter() + PART_SECONDS / ROUNDS
        while time.perf_counter() < until or len(times["base"]) < 2:
            if len(times["base"]) % 2:
                names.reverse()
            else:
                draw.shuffle(names)
            for name in names:
                times[name].append(round(workers[name].ask("time", calls=calls)["seconds"], 9))
    return times


def gate_windows(found: Mapping[str, Any], case: str) -> list[Window]:
    """What `fxopt ci` would have taken, part by part."""
    windows = []
    for part in found["parts"]:
        rounds: list[Round] = []
        for times in part:
            rounds.append(Round(times["base"], times[case], times["again"]))
            if is_tight(Window(tuple(rounds), 1, 0.0, 0.0), CASES[case][1]):
                break
        windows.append(Window(tuple(rounds), 1, 0.0, 0.0))
    return windows


def verdicts(found: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """By case and protocol; `before` is the window before, with the baseline that is stored."""
    said: dict[str, dict[str, str]] = {}
    for case, (_, threshold) in CASES.items():
        windows = gate_windows(found, case)
        count = next((n for n in range(1, len(windows)) if not wants_another(windows[:n], threshold)), len(windows))
        said[case] = {"fxopt ci": str(judge_windows(windows[:count], threshold))}
        # One side after the other: the base by the first half of the rounds, the head by the second.
        rounds = [times for part in found["parts"] for times in part]
        half = len(rounds) // 2
        base = [time for times in rounds[:half] for time in times["base"]]
        head = [time for times in rounds[half:] for time in times[case]]
        ratio = statistics.median(head) / statistics.median(base)
        significant = mannwhitneyu(base, head).pvalue < 0.002
        said[case]["asv"] = rule(ratio if significant else 1.0, threshold)
        said[case]["torch.utils.benchmark medians"] = rule(ratio, threshold)
        if before is not None:
            stored = [time for part in before["parts"] for times in part for time in times["base"]]
            now = [time for times in rounds for time in times[case]]
            said[case]["pytest-benchmark compare"] = rule(statistics.fmean(now) / statistics.fmean(stored), threshold)
    return said


def rule(ratio: float, threshold: float) -> str:
    """What a comparison without an interval says."""
    return "REGRESSION" if ratio > 1 + threshold else "OK"


def command(root: Path) -> dict[str, float]:
    """`fxopt ci` as a user calls it, on a model of about 5 ms.

    Returns:
        Seconds of all, of its windows, of timed calls, and of a script that imports torch and the model and does
        nothing: what any tool takes that runs this model.
    """
    directory = model(root, LARGE, 1)
    if not (directory / ".git").exists():
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        for arguments in (["init", "-q"], ["add", "model.py"], [*identity, "commit", "-q", "-m", "A model"]):
            subprocess.run(["git", *arguments], cwd=directory, check=True)

    def timed(*arguments: str) -> tuple[float, str]:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=directory, check=False, capture_output=True, text=True)
        return time.perf_counter() - began, done.stdout

    bare, _ = timed("-c", "import model")
    seconds, said = timed("-m", "fxopt", "ci", "model.py", "--quiet", "--format", "json")
    latency = json.loads(said)["targets"][0]["latency"]
    measuring = {"windows": latency["seconds"], "calls": latency["measuring_seconds"]}
    return {"seconds": seconds, "bare": bare, "base_ms": latency["base_ms"], **measuring}


def judged(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What every rule says of every window, and the slow-downs as all windows of a cell together show them."""
    cells: dict[str, Any] = {}
    for cell in sorted({one["cell"] for one in done}):
        windows = sorted((one for one in done if one["cell"] == cell), key=lambda one: int(one["window"]))
        rounds = [times for one in windows for part in one["parts"] for times in part]
        cells[cell] = {
            "windows": len(windows),
            "base_ms": 1e3 * statistics.median(time for times in rounds for time in times["base"]),
            "true": {case: true_ratio(rounds, case) for case in CASES},
            "pairs": statistics.median(sum(len(t["base"]) for part in one["parts"] for t in part) for one in windows),
            "seconds": statistics.median(one["seconds"] for one in windows),
            "verdicts": [verdicts(one, before) for one, before in zip(windows, [None, *windows], strict=False)],
        }
    return {"cpu": done[0]["cpu"], "cells": cells}


def true_ratio(rounds: Sequence[Mapping[str, Sequence[float]]], case: str) -> float:
    """The median of the ratios that the rounds show."""
    return statistics.median(statistics.median(times[case]) / statistics.median(times["base"]) for times in rounds)


def render(record: Mapping[str, Any]) -> str:
    """Markdown: how often each protocol says REGRESSION, and OK."""
    rows, facts = [], []
    for cell, found in record["cells"].items():
        threads, _, noise = cell.partition(":")
        true = ", ".join(f"{case}: {100 * (ratio - 1):+.1f} %" for case, ratio in found["true"].items())
        facts.append(
            f"- {threads} threads, other work {noise}: {found['base_ms']:.2f} ms a call, {found['windows']} windows of "
            f"{found['pairs']:.0f} pairs and {found['seconds']:.0f} s in the median; true differences {true}"
        )
        for protocol in PROTOCOLS:
            said = {case: [one[case][protocol] for one in found["verdicts"] if protocol in one[case]] for case in CASES}
            rows.append([threads, noise, protocol, *(share(said[case]) for case in CASES)])
    head = ["threads", "other work", "protocol"]
    head += [f"{case} at {100 * limit:.0f} %" for case, (_, limit) in CASES.items()]
    return (
        "# What protocols see\n\nHow often each says REGRESSION / OK, in % of the windows, the rest is INCONCLUSIVE; "
        "in brackets the 95 % interval of the first (Clopper-Pearson). A window is one comparison with processes of "
        "its own; all rules judge the same times, and the slower models do more work "
        "(`python benchmarks/protocols.py`).\n\n"
        + tabulate(rows, head, tablefmt="github", disable_numparse=True)
        + "\n\n"
        + "\n".join([*facts, *spent(record), f"- processor of the windows: {record['cpu']}"])
        + "\n"
    )


def spent(record: Mapping[str, Any]) -> list[str]:
    """What `fxopt ci` itself takes."""
    commands: Sequence[Mapping[str, float]] = record["commands"]
    if not commands:
        return []

    def outside(what: str, less: str = "") -> str:
        own = [one["seconds"] - one[what] - (one[less] if less else 0.0) for one in commands]
        parts = [100 * seconds / one["seconds"] for seconds, one in zip(own, commands, strict=True)]
        return f"{min(own):.1f} to {max(own):.1f} s, {min(parts):.0f} to {max(parts):.0f} %"

    calls = [one["seconds"] for one in commands]
    bare = [one["bare"] for one in commands]
    return [
        f"- `fxopt ci` on equal models of {commands[0]['base_ms']:.1f} ms, {len(commands)} times: {min(calls):.1f} to "
        f"{max(calls):.1f} s from call to exit (a comparison that is settled early ends early). Outside of the windows "
        f"in which sides are timed, in processes that start there, {outside('windows')}, of which a script that "
        f"imports torch and the model and does nothing takes {min(bare):.1f} to {max(bare):.1f} s; the rest, "
        f"{outside('windows', 'bare')}, is the tool's own. Outside of the timed calls themselves {outside('calls')}. "
        f"Processor: {record['commands_cpu']}"
    ]


def share(said: Sequence[str]) -> str:
    """`3 [1, 8] / 90 of 100`."""
    if not said:
        return "-"
    regressions, fine = said.count("REGRESSION"), said.count("OK") + said.count("FASTER")
    bounds = binomtest(regressions, len(said)).proportion_ci()
    first = f"{100 * regressions / len(said):.0f} [{100 * bounds.low:.0f}, {100 * bounds.high:.0f}]"
    return f"{first} / {100 * fine / len(said):.0f} of {len(said)}"


if __name__ == "__main__":
    main()
