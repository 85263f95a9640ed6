"""Quantise a small network that reads digits: after training, in training, and as an integer file that runs.

    python examples/qat_digits.py                 # five seeds: about ten minutes on two cores
    python examples/qat_digits.py --seeds 1

For each seed a depthwise network learns half of scikit-learn's digits; the other half is held out. Then, for each width
of weights and activations: post-training quantisation of a network that was given the same further epochs as floats,
and quantisation-aware training. Both are frozen and run as files in onnxruntime (and in OpenVINO, where it is
installed).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt.errors import EngineError
from passes import PTQ, QAT, Fuse, QuantizeFreeze

WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W3A4": (3, 4)}
EPOCHS, FURTHER = 60, 20
# What serves each better: floats learn no more by 3e-3, and the rounded net needs larger steps to leave its grid.
FLOAT_RATE, QUANTIZED_RATE = 1e-3, 5e-3


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
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(images) // 64 + 1))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(module(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module | fxopt.Executable, images: Tensor, labels: Tensor) -> float:
    return float((module(images).argmax(1) == labels).float().mean())


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    images, labels, held_images, held_labels = digits()
    base = train(Depthwise(), images, labels, EPOCHS, 1e-2)
    control = train(copy.deepcopy(base), images, labels, FURTHER, FLOAT_RATE)
    found = {"float": {"simulated": accuracy(control, held_images, held_labels)}}
    batches = list(images[:512].split(64))
    for name, (weights, activations) in WIDTHS.items():
        options = {"weights": f"int{weights}", "activations": f"uint{activations}", "target": "onnxruntime"}
        ptq = [Fuse(), PTQ(**options), QuantizeFreeze()]  # type: ignore[arg-type]
        qat = [Fuse(), QAT(**options, learned="lsq")]  # type: ignore[arg-type]
        after = fxopt.optimize(control, images[:64], ptq, devices=(), calibration_data=batches).module
        during = fxopt.optimize(base, images[:64], qat, devices=(), calibration_data=batches).module
        train(during, images, labels, FURTHER, QUANTIZED_RATE)
        during = fxopt.optimize(during, images[:64], [QuantizeFreeze()], devices=()).module
        for kind, module in (("PTQ", after), ("QAT", during)):
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
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record here, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    runs = []
    for seed in range(options.first, options.first + options.seeds):
        start = time.perf_counter()
        runs.append(one_seed(seed))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for name in runs[0]:
        cells = []
        for key in dict.fromkeys(key for run in runs for key in run[name]):
            values = [100 * run[name][key] for run in runs if key in run[name]]
            missing = "" if len(values) == len(runs) else f", {len(values)} of {len(runs)} seeds"
            cells.append(f"{key} {statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}{missing})")
        print(f"{name:10} " + ", ".join(cells))
    for width in WIDTHS:
        for key in ("simulated", "onnxruntime", "openvino"):
            # A PTQ file that its engine refuses has its simulation's accuracy; a QAT file that is refused has none.
            pairs = [(run[f"{width} QAT"], run[f"{width} PTQ"]) for run in runs]
            ahead = sum(qat.get(key, 0.0) > ptq.get(key, ptq["simulated"]) for qat, ptq in pairs)
            print(f"{width}, {key}: QAT ahead of PTQ with {ahead} of {len(runs)} seeds")
    if options.out is not None:
        options.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
