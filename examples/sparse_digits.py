"""Hold most weights of a trained network at zero, train it back, and run what is left by the engine `sparse`.

    python examples/sparse_digits.py     # a minute on two cores; --out FILE writes the table as Markdown

A multilayer perceptron learns scikit-learn's digits. From there each row of the table goes its own way: masks that fill
up along the cubic schedule of Zhu & Gupta 2017, or 2 of each 4 weights, or blocks of 16x16; each trains on under its
masks, is baked, and is timed beside the dense network, in turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from digits_cnn import digits

import fxopt
from passes import Sparsify, sparsify
from passes.sparsify import SparsityScheduler

BATCH = 64


def network(width: int) -> nn.Sequential:
    """Two wide hidden layers: most of the time goes into their products."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    right: float = (module(images).argmax(1) == labels).float().mean().item()
    return right


def train(module: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """AdamW, and the masks behind it where there are any."""
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01)
    scheduler = SparsityScheduler(module, optimizer) if sparsify.masked_weights(module) else None
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            loss = functional.cross_entropy(module(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def plans(steps: int) -> dict[str, Sparsify]:
    """What each row of the table asks for; the last layer, of 10 outputs, stays dense."""
    cubic = {"schedule": "cubic", "steps": steps, "every": 5, "exclude": ("5",)}
    rows = {f"{share:.0%}, cubic": Sparsify(amount=share, **cubic) for share in (0.7, 0.9, 0.95)}  # type: ignore[arg-type]
    rows["2:4"] = Sparsify(granularity="2:4", **cubic)  # type: ignore[arg-type]
    rows["90%, blocks 16x16"] = Sparsify(amount=0.9, granularity="block16x16", **cubic)  # type: ignore[arg-type]
    return rows


def milliseconds(dense: nn.Module, other: nn.Module, x: Tensor, rounds: int = 60) -> tuple[float, float]:
    """The median time of a call of each, taken in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(rounds):
            for module, into in zip((dense, other), times, strict=True):
                began = time.perf_counter()
                module(x)
                into.append(1e3 * (time.perf_counter() - began))
    first, second = (sorted(each[5:])[len(each[5:]) // 2] for each in times)
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the table there too, as Markdown")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the layers are too small for more
    images, labels, held_images, held_labels = digits()
    dense = network(options.width)
    train(dense, images, labels, options.epochs, 1e-3)
    dense.eval()
    steps = (len(images) // BATCH + 1) * options.epochs // 2
    rows = [["dense", "0.0 %", accuracy(dense, held_images, held_labels), "", "", ""]]
    x = held_images[:16]
    for name, plan in plans(steps).items():
        module = fxopt.optimize(copy.deepcopy(dense).train(), images[:BATCH], [plan], devices=()).module
        train(module, images, labels, options.epochs, 5e-4)
        module.eval()
        sparsify.bake(module)
        clean = network(options.width)
        clean.eval().load_state_dict(module.state_dict())
        hidden = [layer.weight for layer in clean if isinstance(layer, nn.Linear)][:2]
        zeros = sum(int((weight == 0).sum()) for weight in hidden) / sum(weight.numel() for weight in hidden)
        fast = fxopt.lower(clean, x, "sparse")
        before, after = milliseconds(dense, fast, x)
        right = accuracy(fast, held_images, held_labels)
        rows.append([name, f"{zeros:.1%}", right, before, after, f"{before / after:.2f}x"])
    heads = ("", "zeros in hidden layers", "accuracy", "dense, ms", "by engine sparse, ms", "speed-up")
    floats = ("", "", ".4f", ".3f", ".3f", "")
    note = f"times of {len(x)} images, in turns; accuracy on {len(held_labels)} images that no training saw"
    print(tabulate(rows, heads, floatfmt=floats, tablefmt="simple"))
    print(note)
    if options.out is not None:
        table = tabulate(rows, heads, floatfmt=floats, tablefmt="github")
        options.out.write_text(f"{table}\n\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
