"""Writes adapter_config.json; `settings` reads it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from passes.lora.adapter import Beside
from passes.lora.entries import Entry


def configuration(
    module: nn.Module, entries: Sequence[Entry], beside: Beside, rslora: bool, dropout: float
) -> dict[str, Any]:
    """That of an adapter, as PEFT has it: common values once, others by patterns."""
    ranks = {entry.label: entry.rank for entry in entries}
    alphas = {entry.label: _alpha(entry, rslora) for entry in entries}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    modules = sorted(entry.name.removesuffix(".out_proj") if entry.in_attention else entry.name
                     for entry in entries if not entry.parameter)  # fmt: skip
    parameters = [entry.parameter for entry in reversed(entries) if entry.parameter]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": any(entry.magnitude is not None for entry in entries),
        "lora_bias": any(entry.bias is not None for entry in entries),
        "bias": beside.bias,
        "init_lora_weights": True,
        "fan_in_fan_out": bool(modules) and all(entry.transposed for entry in entries),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "target_modules": _targets(module, list(dict.fromkeys(modules))),
        "target_parameters": parameters or None,
        "modules_to_save": list(beside.modules) or None,
    }


def _targets(module: nn.Module, names: list[str]) -> str | list[str]:
    """Names where they mean nothing else, else a regular expression: PEFT takes a name for an end of names too."""
    every = [path for path, _ in module.named_modules() if not path.startswith("lora.")]
    if any(path.endswith(f".{name}") for path in every for name in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _alpha(entry: Entry, rslora: bool) -> float:
    alpha = entry.scale * (math.sqrt(entry.rank) if rslora else entry.rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, abs(alpha)) else alpha
