"""Sparse linear layers beside dense ones: one interleaved run, each time relative to the dense model.

python benchmarks/sparsity.py            # a quarter of an hour; writes benchmarks/results/sparsity.json and sparsity.md

The model is six linear layers 768-3072-768-... with ReLUs between them, its weights zero at random places. `engine` is
`fxopt.lower(model, x, "sparse")` with its own gate; `onednn` the engine of that name, which looks at no zeros; `csr`
is `F.linear(x, csr)`, what torch offers for a sparse weight; `mask` the product of a weight masked at each call.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from turns import in_turns

import fxopt
from fxopt.bench import fingerprint
from fxopt.bench.statistics import paired_interval
from fxopt.engines.executable import Executable

RESULTS = Path(__file__).parent / "results"


def mlp(amount: float, layers: int = 6, block: int = 1) -> nn.Sequential:
    """Linear layers of 768 and 3072 with ReLUs between them; a share of the weights, in blocks, is zero."""
    parts: list[nn.Module] = []
    for index in range(layers):
        linear = nn.Linear(*((3072, 768) if index % 2 else (768, 3072)))
        rows, columns = (size // block for size in linear.weight.shape)
        kept = (torch.rand(rows, columns) >= amount).repeat_interleave(block, 0).repeat_interleave(block, 1)
        with torch.no_grad():
            linear.weight.mul_(kept)
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).eval()


class SparseTensors(nn.Module):
    """The same layers with `F.linear` on a CSR tensor."""

    def __init__(self, model: nn.Sequential):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layers = [
                (part.weight.detach().to_sparse_csr(), part.bias.detach())
                for part in model
                if isinstance(part, nn.Linear)
            ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the model, layer by layer."""
        for index, (weight, bias) in enumerate(self.layers):
            x = F.linear(torch.relu(x) if index else x, weight, bias)
        return x


class Masks(nn.Module):
    """The same layers with masks that are multiplied in at each call."""

    def __init__(self, model: nn.Sequential):
        super().__init__()
        self.layers = [part for part in model if isinstance(part, nn.Linear)]
        self.masks = [(part.weight != 0).float() for part in self.layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the model, layer by layer."""
        for index, (layer, mask) in enumerate(zip(self.layers, self.masks, strict=True)):
            x = F.linear(torch.relu(x) if index else x, layer.weight * mask, layer.bias)
        return x


def row(amount: float, batch: int, block: int, seconds: float) -> dict[str, Any]:
    """One amount and one batch size, measured."""
    torch.manual_seed(0)
    model, x = mlp(amount, block=block), torch.randn(batch, 768)
    arms: dict[str, nn.Module] = {"dense": model, "again": copy.deepcopy(model)}
    engine: Executable = fxopt.lower(model, (x,), "sparse")
    arms["engine"] = engine
    arms["onednn"] = fxopt.lower(model, (x,), "onednn")
    arms["csr"] = SparseTensors(model)
    arms["mask"] = Masks(model)
    with torch.no_grad():
        expected = model(x)
        errors = {name: float((arm(x) - expected).abs().max() / expected.abs().max()) for name, arm in arms.items()}
        if max(errors.values()) > 1e-4:
            raise SystemExit(f"the arms compute different things: {errors}")
        times = in_turns({name: (lambda arm=arm: arm(x)) for name, arm in arms.items()}, seconds)  # type: ignore[misc]
    found = {name: paired_interval(each, times["dense"]) for name, each in times.items() if name != "dense"}
    return {
        "amount": amount,
        "batch": batch,
        "block": block,
        "speedups": {name: [round(v, 4) for v in (each.ratio, each.low, each.high)] for name, each in found.items()},
        "milliseconds": {name: round(1e3 * statistics.median(each), 4) for name, each in times.items()},
        "choices": dict(engine.choices),
        "times": {name: [round(value, 7) for value in each] for name, each in times.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, to read."""
    arms = list(rows[0]["speedups"])
    lines = [
        "Six linear layers 768-3072, whole model, `python benchmarks/sparsity.py`: speed-up over dense float32 with",
        "its 95 % interval, above 1 is faster. `again` is a copy of the dense model: the noise.",
        "",
        f"| zeros | batch | dense, ms | {' | '.join(arms)} | kernels of the engine |",
        f"|---|---|---|{'---|' * len(arms)}---|",
    ]
    for each in rows:
        cells = " | ".join("{:.2f} [{:.2f}, {:.2f}]".format(*each["speedups"][arm]) for arm in arms)
        blocks = "" if each["block"] == 1 else f" in blocks {each['block']}x{each['block']}"
        kernels = list(each["choices"]["kernels"].values())
        used = ", ".join(f"{kernels.count(name)}x {name}" for name in dict.fromkeys(kernels)) or "torch's"
        share, dense = f"{each['amount']:.0%}{blocks}", each["milliseconds"]["dense"]
        lines.append(f"| {share} | {each['batch']} | {dense:.2f} | {cells} | {used} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--amounts", type=float, nargs="*", default=[0.5, 0.7, 0.9, 0.95])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    plans = [(amount, batch, 1) for amount in options.amounts for batch in options.batches]
    for amount, batch, block in [*plans, *((0.9, batch, 16) for batch in options.batches)]:
        found = row(amount, batch, block, options.seconds)
        rows.append(found)
        print(f"{amount:.0%}", batch, block, found["speedups"], found["choices"], flush=True)
    record = {"machine": fingerprint(), "threads": options.threads, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sparsity.json").write_text(json.dumps(record, default=vars) + "\n", encoding="utf-8")
    (options.out / "sparsity.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
