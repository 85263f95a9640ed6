"""Quantise a small network that reads digits: after training, in training, and as an integer file that runs.

    python examples/qat_digits.py                 # five seeds: about ten minutes on one core
    python examples/qat_digits.py --seeds 1
    python examples/qat_digits.py --choose        # how the learning rates below were chosen

For each seed a depthwise network learns half of scikit-learn's digits; the other half is held out. Then, for each width
of weights and activations: post-training quantisation of a network that was given the same further epochs as floats,
plainly and with what `ptq` evens out and corrects by itself, and quantisation-aware training. All are frozen and run as
files in onnxruntime (and in OpenVINO, where it is installed).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.errors import EngineError
from fxopt.modules import FakeQuantize
from passes import PTQ, QAT, Fuse, QuantizeFreeze
from passes.qat import QATSchedule

WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3A4": (3, 4)}
EPOCHS, FURTHER = 60, 20
RATES = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
FLOAT_RATE, QUANTIZED_RATE = 4e-2, 4e-2
"""By `--choose`, which sees the training half alone: of floats the one whose quantised networks are best."""
FOLLOW, LEARN = {"observer": "ema"}, {"learned": "lsq"}
RANGES = {"W8A8": FOLLOW, "W4A8": FOLLOW, "W4A4": LEARN, "W3A4": LEARN}
"""On the same split, at that rate: learned scales are better where activations have few steps, else moving averages. A
range that only widens would keep what the first steps, which are long, have passed through it."""
SCALES_RATE = 0.05
"""Of the rate of weights: AdamW's steps are as long as the rate, and scales are small."""
NORMS_TRAIN = 0.85
"""Share of the steps after which batch norms rest: from then on training sees the weights that will be folded."""
PLAIN = {"equalize": False, "correct": False}
"""Ranges and rounding alone, without cross-layer equalization and bias correction."""


class Depthwise(nn.Module):
    """Pairs of a depthwise and a pointwise convolution, which are hard to quantise."""

    def __init__(self, width: int = 12):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for stride in (1, 2, 1):
            layers += [
                nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean((2, 3)))
        return logits


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on, then as many held out."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, held_out = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=data.target)
    return images[train], labels[train], images[held_out], labels[held_out]


def train(module: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> nn.Module:
    module.train()
    steps = epochs * (len(images) // 64 + 1)
    scales = [child.scale for child in module.modules() if isinstance(child, FakeQuantize) and child.learned]
    weights = [p for p in module.parameters() if p.requires_grad and all(p is not scale for scale in scales)]
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": scales, "lr": SCALES_RATE * rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, rate)
    schedules: list[Any] = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]
    if any(isinstance(child, FakeQuantize) for child in module.modules()):
        schedules.append(QATSchedule(module, freeze_norms_at=int(NORMS_TRAIN * steps)))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module | fxopt.Executable, images: Tensor, labels: Tensor) -> float:
    return float((module(images).argmax(1) == labels).float().mean())


def quantized_after(floats: nn.Module, images: Tensor, **options: Any) -> nn.Module:
    ptq = [Fuse(), PTQ(**options), QuantizeFreeze()]
    batches = list(images[:512].split(64))
    return fxopt.optimize(floats, images[:64], ptq, devices=(), calibration_data=batches).module


def quantized_in_training(base: nn.Module, images: Tensor, labels: Tensor, rate: float, **options: Any) -> nn.Module:
    qat = [Fuse(), QAT(**options)]
    batches = list(images[:512].split(64))
    # In training mode batch norms stay what they are; in evaluation mode `fuse` would fold them.
    base = copy.deepcopy(base).train()
    module = fxopt.optimize(base, images[:64], qat, devices=(), calibration_data=batches).module
    train(module, images, labels, FURTHER, rate)
    return fxopt.optimize(module, images[:64], [QuantizeFreeze()], devices=()).module


def options_of(name: str) -> dict[str, str]:
    weights, activations = WIDTHS[name]
    return {"weights": f"int{weights}", "activations": f"uint{activations}", "target": "onnxruntime"}


def choose(seeds: int) -> None:
    """Print the accuracy of each learning rate on a quarter of the training half, trained on the rest of it."""
    images, labels, _, _ = digits()
    found: dict[tuple[float, str], list[float]] = defaultdict(list)
    for seed in range(100, 100 + seeds):
        torch.manual_seed(seed)
        out, left = torch.randperm(len(images)).tensor_split([len(images) // 4])
        base = train(Depthwise(), images[left], labels[left], EPOCHS, 1e-2)
        for rate in RATES:
            floats = train(copy.deepcopy(base), images[left], labels[left], FURTHER, rate)
            found[rate, "float"].append(accuracy(floats, images[out], labels[out]))
            for name in ("W4A8", "W4A4", "W3A4"):
                after = quantized_after(floats, images[left], **options_of(name))
                found[rate, f"{name} PTQ"].append(accuracy(after, images[out], labels[out]))
                for how, ranges in (("follow", FOLLOW), ("learned", LEARN)):
                    options = {**options_of(name), **ranges}
                    during = quantized_in_training(base, images[left], labels[left], rate, **options)
                    kind = f"{name} QAT, ranges {how}"
                    found[rate, kind].append(accuracy(during, images[out], labels[out]))
    for (rate, name), values in found.items():
        print(f"{name:26} at {rate:g}: {100 * statistics.mean(values):.1f}")


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    images, labels, held_images, held_labels = digits()
    base = train(Depthwise(), images, labels, EPOCHS, 1e-2)
    control = train(copy.deepcopy(base), images, labels, FURTHER, FLOAT_RATE)
    found = {"float": {"simulated": accuracy(control, held_images, held_labels)}}
    for name in WIDTHS:
        options = options_of(name)
        modules = {
            "plain PTQ": quantized_after(control, images, **options, **PLAIN),
            "PTQ": quantized_after(control, images, **options),
            "QAT": quantized_in_training(base, images, labels, QUANTIZED_RATE, **options, **RANGES[name]),
        }
        for kind, module in modules.items():
            found[f"{name} {kind}"] = row = {"simulated": accuracy(module, held_images, held_labels)}
            for engine in ("onnxruntime", "openvino"):
                try:
                    file = fxopt.lower(module, held_images, engine=engine)
                except EngineError as error:  # not installed, or too far from the simulation
                    print(f"{name} {kind}: {error}", file=sys.stderr)
                    continue
                row[engine] = accuracy(file, held_images, held_labels)
                with torch.no_grad():
                    same = file(held_images).argmax(1) == module(held_images).argmax(1)
                row[f"{engine} argmax equal"] = float(same.float().mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record to FILE.json and FILE.md")
    parser.add_argument("--choose", action="store_true", help="compare learning rates on a split of the training half")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    if options.choose:
        choose(options.seeds)
        return
    runs = []
    for seed in range(options.first, options.first + options.seeds):
        start = time.perf_counter()
        runs.append(one_seed(seed))
        if options.out is not None:
            options.out.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(render(runs))
    if options.out is not None:
        options.out.with_suffix(".md").write_text(render(runs), encoding="utf-8")


def render(runs: list[dict[str, dict[str, float]]]) -> str:
    """A Markdown table: means over the seeds with the lowest and highest, and how often QAT is ahead of PTQ."""
    columns = list(dict.fromkeys(key for run in runs for row in run.values() for key in row))
    table = [[name, *(_spread(key, [run[name] for run in runs]) for key in columns)] for name in runs[0]]
    ahead = [
        [
            f"{width}: seeds with QAT ahead of {control}",
            *(_ahead(key, width, control, runs) if "equal" not in key else "" for key in columns),
        ]
        for width in WIDTHS
        for control in ("plain PTQ", "PTQ")
    ]
    return (
        f"# Digits, {len(runs)} seeds\n\nAccuracy on the held-out half in %, the mean with the lowest and highest; PTQ "
        "was given the same further epochs as floats; plain PTQ evens out and corrects nothing "
        "(`python examples/qat_digits.py`).\n\n"
        + tabulate([*table, *ahead], ["", *columns], tablefmt="github", disable_numparse=True)
        + "\n"
    )


def _spread(key: str, rows: list[dict[str, float]]) -> str:
    values = [100 * row[key] for row in rows if key in row]
    if not values:
        return "-"
    missing = "" if len(values) == len(rows) else f", {len(values)} of {len(rows)} seeds"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}{missing})"


def _ahead(key: str, width: str, control: str, runs: list[dict[str, dict[str, float]]]) -> str:
    pairs = [(run[f"{width} QAT"].get(key), run[f"{width} {control}"].get(key)) for run in runs]
    both = [(qat, ptq) for qat, ptq in pairs if qat is not None and ptq is not None]
    return f"{sum(qat > ptq for qat, ptq in both)} of {len(both)}"


if __name__ == "__main__":
    main()
