"""Adapters of fxopt beside those of PEFT: one interleaved run, as ratios of paired times with 95 % intervals.

python benchmarks/lora.py            # writes benchmarks/results/lora.json and lora.md

All arms of a row are timed in turns, in an order drawn at random and then in the reverse one, so that drift and
periodic disturbances hit all alike; ratios are taken between times of the same turn, and the intervals are those of
`fxopt.compare`. `base` is there twice: what differs between the two is noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from turns import Run, in_turns

from fxopt import capture
from fxopt.bench import fingerprint
from fxopt.bench.statistics import paired_interval
from fxopt.pipeline import run_passes
from fxopt.torchvision_operators import declare_missing
from passes import LoRA, LoRAMerge
from passes.lora.adapter import LowRank
from passes.lora.inject import inject

RESULTS = Path(__file__).parent / "results"


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], list[str]]]:
    """Builder, example input and target modules of each model."""
    return {
        "linear 768x768": (lambda: nn.Sequential(nn.Linear(768, 768)), lambda: torch.randn(512, 768), ["0"]),
        "linear 3072x768": (lambda: nn.Sequential(nn.Linear(768, 3072)), lambda: torch.randn(512, 768), ["0"]),
        "vit-s": (_vit, lambda: torch.randn(2, 3, 224, 224), ["qkv", "proj", "fc1", "fc2"]),
        "llama": (_llama, lambda: torch.randint(0, 1000, (2, 64)), ["q_proj", "k_proj", "v_proj", "o_proj"]),
    }


def _vit() -> nn.Module:
    declare_missing()
    import timm

    made: nn.Module = timm.create_model("vit_small_patch16_224")
    return made


def _llama() -> nn.Module:
    declare_missing()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        use_cache=False,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


class Logits(nn.Module):
    """A language model that gives its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits of each token."""
        logits: torch.Tensor = self.model(ids).logits
        return logits


def arms(build: Callable[[], nn.Module], x: torch.Tensor, targets: list[str], rank: int) -> dict[str, nn.Module]:
    """The same model without adapters, with those of fxopt and of PEFT, and with those of fxopt merged."""
    declare_missing()
    import peft

    torch.manual_seed(0)
    base = build().eval()
    captured = capture(base, (x,))
    inject(captured.module, LoRA(rank=rank, targets=tuple(targets)))
    _randomize(captured.module)
    ours = copy.deepcopy(captured.module)
    run_passes(captured, [LoRAMerge()])
    plain = capture(base, (x,)).module.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    _randomize(theirs)
    return {
        "base": base.requires_grad_(False),
        "graph": plain,
        "fxopt": ours,
        "peft": theirs,
        "merged": captured.module,
    }


def _randomize(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora" in name:
            with torch.no_grad():
                parameter.normal_(std=0.01)
    assert any(isinstance(child, LowRank) for child in module.modules()) or "lora" in str(module).lower()


def inference(module: nn.Module, x: torch.Tensor) -> Run:
    """One forward without gradients."""

    def call() -> None:
        with torch.inference_mode():
            module(x)

    return call


def training(module: nn.Module, x: torch.Tensor) -> Run:
    """Forward, backward and a step of AdamW on what trains."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-5)

    def call() -> None:
        optimizer.zero_grad()
        module(x).float().square().mean().backward()
        optimizer.step()

    return call


def ratio(times: dict[str, list[float]], arm: str, base: str) -> list[float]:
    """Median of the paired ratios, and the ends of its interval."""
    found = paired_interval(times[base], times[arm])
    return [round(found.ratio, 4), round(found.low, 4), round(found.high, 4)]


def injection(layers: int = 1000) -> float:
    """Seconds to put adapters on a model of many layers, once it is captured."""
    module = capture(nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), (torch.randn(2, 8),)).module
    began = time.perf_counter()
    inject(module, LoRA())
    return time.perf_counter() - began


def import_seconds(what: str, repeats: int = 5) -> float:
    """Median seconds that an import takes beyond that of torch, in fresh interpreters."""
    code = f"import time, torch; b = time.perf_counter(); import {what}; print(time.perf_counter() - b)"
    runs = [subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
            for _ in range(repeats)]  # fmt: skip
    return statistics.median(float(run.stdout) for run in runs)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", choices=list(models()), default=list(models()))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        build, example, targets = models()[name]
        for rank in (8, 64):
            x = example()
            for kind, make in (("inference", inference), ("training", training)):
                made = arms(build, x, targets, rank)
                if kind == "training":
                    made = {arm: module for arm, module in made.items() if arm in ("fxopt", "peft")}
                    made["again"] = copy.deepcopy(made["peft"])
                else:
                    made["again"] = copy.deepcopy(made["base"])
                times = in_turns({arm: make(module, x) for arm, module in made.items()}, options.seconds)
                base = "base" if kind == "inference" else "peft"
                row: dict[str, Any] = {"model": name, "rank": rank, "kind": kind, "relative_to": base}
                row["ratios"] = {arm: ratio(times, arm, base) for arm in times if arm != base}
                row["fxopt_to_peft"] = ratio(times, "fxopt", "peft")
                row["milliseconds"] = {arm: round(1e3 * statistics.median(each), 4) for arm, each in times.items()}
                row["times"] = {arm: [round(t, 7) for t in each] for arm, each in times.items()}
                rows.append(row)
                print(name, rank, kind, row["ratios"], "fxopt/peft", row["fxopt_to_peft"], flush=True)
    facts = {
        "injection_1000_layers_seconds": round(injection(), 3),
        "import_fxopt_passes_seconds": round(import_seconds("fxopt, passes"), 3),
    }
    print(facts)
    record = {"machine": fingerprint(), "threads": options.threads, "facts": facts, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lora.json").write_text(json.dumps(record, default=vars) + "\n", encoding="utf-8")
    (RESULTS / "lora.md").write_text(table(rows, facts), encoding="utf-8")


def table(rows: list[dict[str, Any]], facts: dict[str, float]) -> str:
    """What was measured, to read."""
    lines = [
        "Adapters of fxopt beside PEFT's, `python benchmarks/lora.py`: ratios of times with 95 % intervals, below 1 is",
        "faster. Noise is what the same measurement found between two copies of one model.",
        "",
        "| model | rank | fxopt / base | PEFT / base | fxopt / PEFT | merged / base | noise "
        "| training: fxopt / PEFT | noise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    steps = {(row["model"], row["rank"]): row for row in rows if row["kind"] == "training"}
    for row in rows:
        if row["kind"] == "inference":
            step, ratios = steps[row["model"], row["rank"]], row["ratios"]
            found = [ratios["fxopt"], ratios["peft"], row["fxopt_to_peft"], ratios["merged"], ratios["again"]]
            found += [step["fxopt_to_peft"], step["ratios"]["again"]]
            cells = " | ".join(f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in found)
            lines.append(f"| {row['model']} | {row['rank']} | {cells} |")
    lines += ["", *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
