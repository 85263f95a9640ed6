"""How often protocols see a slow-down that is not there, and miss one that is.

    python benchmarks/protocols.py [--windows 100] [--threads 1 2] [--noise on off] [--out benchmarks/results]

A small residual network of about 5 ms a call is held against itself (A/A) and against itself with extra
convolutions, as many as take 5 or 10 % of its time. With noise, a process beside it is busy and idle in turns of
random length. Each window measures by each protocol anew and is a line of protocols.jsonl, so a run that was
stopped goes on where it was; the table is in protocols.md. A window takes about 40 s on two quiet cores: 100
windows of all three cases, at 1 and 2 threads and with noise on and off, take about 13 hours.

The peers' rules are applied to times taken as they take them: pytest-benchmark's compare holds means against those
of an earlier run, asv times one side after the other and asks for Mann-Whitney p < 0.002 beside the ratio, and for
torch.utils.benchmark the medians of one block after the other are compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scipy.stats import mannwhitneyu
from tabulate import tabulate

from fxopt.bench import fingerprint
from fxopt.gate.processes import Checkout, Launcher, Worker
from fxopt.gate.verdict import judge_windows, wants_another
from fxopt.gate.window import Window, take_window

CASES = {"A/A": (0.0, 0.05), "+10 %": (0.10, 0.05), "+5 %": (0.05, 0.03)}
"""The true slow-down, and the threshold that it is held to."""
CALLS = 200
PROTOCOLS = ("fxopt ci", "pytest-benchmark compare", "asv", "torch.utils.benchmark medians")

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
    def __init__(self, extra):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(32) for _ in range(3)))
        self.unit = nn.Conv2d(32, 4, 1)
        self.extra = extra
    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x)))
        for _ in range(self.extra):
            x = x + 0 * self.unit(x[:, :, :8, :8]).mean()
        return x.mean((2, 3))

torch.manual_seed(0)
model = Net({extra})
example_inputs = torch.randn(1, 3, 48, 48)
"""

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
    """Measure what is not measured yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=100, help="of each case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--noise", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--budget", type=float, default=20.0, help="of `fxopt ci`, in seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "protocols.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for threads in options.threads:
        with sides(threads) as starts:
            for noise in options.noise:
                for number in range(options.windows):
                    # All cases take turns, so that the hours of the day hit them alike.
                    for case in CASES:
                        key = {"threads": threads, "noise": noise, "case": case, "window": number}
                        if any(key.items() <= one.items() for one in done):
                            continue
                        with load(noise == "on", number):
                            found = key | measure(starts[case], case, options.budget, number)
                        done.append(found)
                        with path.open("a") as file:
                            file.write(json.dumps(found) + "\n")
                        print(key, found["verdicts"], f"{found['seconds']:.0f} s", flush=True)
    text = render(done)
    (options.out / "protocols.md").write_text(text)
    print(text)


@contextmanager
def sides(threads: int) -> Iterator[dict[str, dict[str, Callable[[], Worker]]]]:
    """For each case, what starts the base and what starts the head."""
    with tempfile.TemporaryDirectory(prefix="fxopt-protocols-") as root, Launcher() as launcher:

        def start(extra: int) -> Worker:
            directory = Path(root) / str(extra)
            directory.mkdir(exist_ok=True)
            (directory / "model.py").write_text(MODEL.replace("{extra}", str(extra)))
            order: dict[str, Any] = {"target": "model.py", "inputs": [], "weights": None, "passes": "", "device": "cpu"}
            order |= {"threads": threads, "stages": None, "changes": None, "shared": None}
            return launcher.start(Checkout("head", str(extra), directory), order)

        unit = cost_of_one(start)
        extras = {case: round(slower / unit) for case, (slower, _) in CASES.items()}
        print(f"one unit of extra work takes {100 * unit:.2f} % of a call: {extras}", flush=True)
        yield {
            case: {"base": functools.partial(start, 0), "head": functools.partial(start, extra)}
            for case, extra in extras.items()
        }


def cost_of_one(start: Callable[[int], Worker], units: int = 20) -> float:
    """The share of a call that one unit of extra work takes."""
    starts = {"base": functools.partial(start, 0), "head": functools.partial(start, units)}
    window = take_window(starts, budget=20, tight=0.005)
    return (window.effect.ratio - 1) / units


@contextmanager
def load(on: bool, seed: int) -> Iterator[None]:
    """Other work on the machine, on and off."""
    process = subprocess.Popen([sys.executable, "-c", BUSY, str(seed)]) if on else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure(starts: dict[str, Callable[[], Worker]], case: str, budget: float, seed: int) -> dict[str, Any]:
    """One window by every protocol, in random order."""
    threshold = CASES[case][1]
    order = ["gate", "stored", "consecutive"]
    random.Random(seed).shuffle(order)
    verdicts: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for name in order:
        began = time.perf_counter()
        if name == "gate":
            windows: list[Window] = []
            while not windows or wants_another(windows, threshold):
                windows.append(take_window(starts, budget=budget / 3, tight=threshold, seed=seed + 1000 * len(windows)))
            verdicts["fxopt ci"] = str(judge_windows(windows, threshold))
            measuring = sum(window.measuring for window in windows)
            facts["seconds"] = time.perf_counter() - began
            facts["own_share"] = 1 - measuring / facts["seconds"]
            facts["ratio"] = statistics.median(window.effect.ratio for window in windows)
            facts["preempted"] = statistics.fmean(window.preempted or 0.0 for window in windows)
        elif name == "stored":
            # An earlier run is one of another process, some seconds ago.
            base = block(starts["base"])
            time.sleep(random.Random(seed).uniform(1, 5))
            head = block(starts["head"])
            verdicts["pytest-benchmark compare"] = rule(statistics.fmean(head) / statistics.fmean(base), threshold)
        else:
            base, head = block(starts["base"]), block(starts["head"])
            ratio = statistics.median(head) / statistics.median(base)
            significant = mannwhitneyu(base, head).pvalue < 0.002
            verdicts["asv"] = rule(ratio if significant else 1.0, threshold)
            verdicts["torch.utils.benchmark medians"] = rule(ratio, threshold)
    return {"verdicts": verdicts, **facts, "machine": asdict(fingerprint())["cpu"]}


def block(start: Callable[[], Worker]) -> list[float]:
    """The times of one side by itself, in seconds."""
    with start() as worker:
        worker.ask("warm")
        return [float(worker.ask("time", calls=1)["seconds"]) for _ in range(CALLS)]


def rule(ratio: float, threshold: float) -> str:
    """What a comparison without an interval says."""
    return "REGRESSION" if ratio > 1 + threshold else "OK"


def render(done: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: how often each protocol says REGRESSION, and OK."""
    rows = []
    for threads, noise in sorted({(one["threads"], one["noise"]) for one in done}):
        for protocol in PROTOCOLS:
            cells = [str(threads), noise, protocol]
            for case in CASES:
                keys = {"threads": threads, "noise": noise, "case": case}
                said = [one["verdicts"][protocol] for one in done if keys.items() <= one.items()]
                regressions, fine = said.count("REGRESSION"), said.count("OK") + said.count("FASTER")
                cells.append(f"{share(regressions, said)} / {share(fine, said)} of {len(said)}")
            rows.append(cells)
    head = ["threads", "noise", "protocol", *(f"{case} at {100 * limit:.0f} %" for case, (_, limit) in CASES.items())]
    seconds = sorted(one["seconds"] for one in done)
    own = statistics.median(one["own_share"] for one in done)
    last = seconds[math.ceil(0.95 * len(seconds)) - 1]
    return (
        "# What protocols see\n\nHow often each says REGRESSION / OK, in % of the windows; the rest is INCONCLUSIVE "
        "(`python benchmarks/protocols.py`).\n\n"
        + tabulate(rows, head, tablefmt="github", disable_numparse=True)
        + f"\n\n`fxopt ci` took {statistics.median(seconds):.0f} s in the median and {last:.0f} s in 95 % of the "
        f"windows, {100 * own:.0f} % of it outside of measuring. Processor: {done[0]['machine']}.\n"
    )


def share(count: int, said: Sequence[str]) -> str:
    """A percentage."""
    return f"{100 * count / len(said):.0f}" if said else "-"


if __name__ == "__main__":
    main()
