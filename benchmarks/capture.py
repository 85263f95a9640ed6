"""What capture costs beside one eager forward: time and memory, for a residual network, chains and a 70-billion model.

    python benchmarks/capture.py [--out benchmarks/results]

Each row runs in a process of its own, so that its peak memory is its own, on one thread; times are processor
seconds, which other work on the machine does not add to. Writes capture.json, capture.md and capture.svg; the plot
needs matplotlib, which the extra `bench` brings.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt.capture import capture

CHAINS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)


class Chain(nn.Module):
    """As many operations in a row as asked for, half of them on parameters."""

    def __init__(self, nodes: int):
        super().__init__()
        self.nodes = nodes
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Alternate a sine and a sum."""
        for index in range(self.nodes):
            x = x + self.weight if index % 2 else torch.sin(x)
        return x


class Bottleneck(nn.Module):
    """The block of a 50-layer residual network."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.relu = nn.ReLU(inplace=True)
        self.project: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the identity, or its projection."""
        out: torch.Tensor = self.relu(self.body(x) + self.project(x))
        return out


def residual_network() -> nn.Module:
    """Fifty layers, 25.6 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2)]
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for index in range(depth):
            width = 64 << stage
            layers.append(Bottleneck(channels, width, 2 if stage and not index else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)).eval()


def llama_70b() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A 70-billion-parameter decoder on the meta device: 131 GiB of weights, were they there."""
    from fxopt.torchvision_operators import declare_missing

    declare_missing()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        module = LlamaForCausalLM(config).eval()
    return module, (), {"input_ids": torch.randint(0, 1000, (1, 128)), "use_cache": False}


def chain(length: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """So many nodes in a row."""
    return Chain(length).eval(), (torch.randn(2, 8),), {}


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {
    "residual network, 50 layers": lambda: (residual_network(), (torch.randn(1, 3, 224, 224),), {}),
    **{f"chain of {length:,}": functools.partial(chain, length) for length in CHAINS},
    "llama, 70 billion, fake": llama_70b,
}


def measure(name: str) -> dict[str, Any]:
    """One row: eager forward, then capture, with the peak memory of the process after each."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, args, kwargs = CASES[name]()
    fake = name.endswith("fake")
    row: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in module.parameters())}
    if not fake:
        module(*args, **kwargs)
        row["eager_seconds"] = min(_timed(lambda: module(*args, **kwargs)) for _ in range(3))
    row["eager_peak_mib"] = _peak()
    began = time.process_time()
    captured = capture(module, args, kwargs, fake=fake)
    row["capture_seconds"] = time.process_time() - began
    row["capture_peak_mib"] = _peak()
    row["nodes"] = len(captured.module.graph.nodes)
    row["opaque"] = len(captured.opaque)
    return row


def _timed(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "# What capture costs",
        "",
        f"`python benchmarks/capture.py`, torch {facts['torch']}, one thread, {facts['machine']}. Processor "
        "seconds; peak memory is of the whole process, torch included. One run each; eager is the best of three.",
        "",
        "![Capture and eager forward of chains, by their length](capture.svg)",
        "",
        "| model | parameters | nodes | eager (s) | capture (s) | per node (ms) | eager peak (MiB) | peak (MiB) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        eager = f"{row['eager_seconds']:.3f}" if "eager_seconds" in row else "too large"
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['nodes']:,} | {eager} | {row['capture_seconds']:.2f} "
            f"| {1000 * row['capture_seconds'] / row['nodes']:.2f} | {row['eager_peak_mib']:.0f} "
            f"| {row['capture_peak_mib']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw capture and eager seconds of the chains over their nodes, both axes logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "capture"
    from matplotlib import pyplot

    chains = [row for row in rows if row["model"].startswith("chain")]
    nodes = [row["nodes"] for row in chains]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.loglog(nodes, [row["capture_seconds"] for row in chains], marker="o", label="capture")
    axes.loglog(nodes, [row["eager_seconds"] for row in chains], marker="s", label="eager forward")
    first = chains[0]
    linear = [first["capture_seconds"] * count / first["nodes"] for count in nodes]
    axes.loglog(nodes, linear, linestyle=":", color="gray", label="linear")
    axes.set(xlabel="nodes", ylabel="processor seconds", title="A chain of operations")
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Measure all rows, or one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", help="measure this row, and print it as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only)))
        return
    rows = []
    for name in CASES:
        done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    facts = {"torch": torch.__version__, "machine": platform.machine()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "capture.json").write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")
    (options.out / "capture.md").write_text(table(rows, facts))
    plot(rows, options.out / "capture.svg")


if __name__ == "__main__":
    main()
