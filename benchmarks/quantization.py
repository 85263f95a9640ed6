"""What integers gain: latency, size and faithfulness of int8 models, beside float32 in the same runtimes.

    python benchmarks/quantization.py [--out benchmarks/results] [--budget 20] [MODEL ...]

Each model is quantised after training (random weights, random calibration images: the speed and the parity of
the file do not depend on them, accuracy does) and frozen, then run by onnxruntime and, where it is installed, by
OpenVINO. Every row is compared with eager float32 in interleaved pairs. SQNR is that of the file's outputs: against
the float model, and against the simulation in torch. Rows are kept as they come: what is in the record is not
measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxopt
from fxopt import bench
from fxopt.errors import EngineError
from fxopt.torchvision_operators import declare_missing
from passes import PTQ, Clean, Fuse, QuantizeFreeze


def torchvision_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of torchvision and one image."""
    declare_missing()
    import torchvision

    return torchvision.models.get_model(name, weights=None), torch.randn(1, 3, 224, 224)


def vit_tiny() -> tuple[nn.Module, torch.Tensor]:
    """timm's smallest vision transformer and one image."""
    declare_missing()
    import timm

    return timm.create_model("vit_tiny_patch16_224"), torch.randn(1, 3, 224, 224)


class Layer(nn.Module):
    """A transformer layer whose projections are layers of their own, as most models write them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of (batch, tokens, width) to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.before(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        fed: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.behind(x))))
        return fed


def encoder() -> tuple[nn.Module, torch.Tensor]:
    """Six layers of 384, and 128 embedded tokens."""
    return nn.Sequential(*(Layer(384, 6) for _ in range(6))), torch.randn(1, 128, 384)


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "mobilenet_v3_large": lambda: torchvision_model("mobilenet_v3_large"),
    "vit_tiny": vit_tiny,
    "encoder, 6 layers of 384, 128 tokens": encoder,
}
_MODEL_FILES = (".onnx", ".data", ".bin")
FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "onednn, float32": ("onednn", "float", {}),
    "onnxruntime, float32": ("onnxruntime", "float", {}),
    "onnxruntime, int8": ("onnxruntime", "onnxruntime", {}),
    "openvino, float32": ("openvino", "float", {}),
    "openvino, int8": ("openvino", "openvino", {}),
}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each comparison")
    options = parser.parse_args()
    path = options.out / "quantization.json"
    record = json.loads(path.read_text()) if path.exists() else {"models": {}}
    record["machine"] = dataclasses.asdict(bench.fingerprint())
    for name in options.models:
        if name not in record["models"]:
            record["models"][name] = measure(name, options.budget)
            options.out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            (options.out / "quantization.md").write_text(render(record["models"]))
    print(render(record["models"]))


def measure(name: str, budget: float) -> dict[str, Any]:
    """All rows of one model: {form: {ratio, low, high, …} or {"not_measured": reason}}."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    batches = [torch.randn(4, *inputs.shape[1:]) for _ in range(4)]
    graphs: dict[str, nn.Module] = {}
    rows: dict[str, Any] = {"float bytes": sum(p.numel() * p.element_size() for p in model.parameters())}
    with torch.no_grad():
        wanted = model(inputs)
    for form, (engine, target, engine_options) in FORMS.items():
        try:
            if target not in graphs:
                graphs[target] = prepared(model, inputs, target, batches)
            began = time.perf_counter()
            executable = fxopt.lower(graphs[target], inputs, engine=engine, **engine_options)
            built = time.perf_counter() - began
        except EngineError as error:
            rows[form] = {"not_measured": str(error)}
            continue
        found = fxopt.compare(model, executable, inputs, budget_seconds=budget)
        with torch.no_grad():
            deployed, simulated = executable(inputs), graphs[target](inputs)
        rows[form] = {
            "before_ms": found.before_ms,
            "after_ms": found.after_ms,
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "verdict": str(found.verdict),
            "noise_floor": found.noise_floor,
            "pairs": found.pairs,
            "build_seconds": built,
            "sqnr_db": sqnr(deployed, wanted),
            "sqnr_to_simulation_db": sqnr(deployed, simulated),
            "file_bytes": size(executable) if engine != "onednn" else None,
        }
        print(name, form, f"{found.speedup:.2f}x", flush=True)
    return rows


def prepared(model: nn.Module, inputs: torch.Tensor, target: str, batches: list[torch.Tensor]) -> nn.Module:
    """The graph that goes to the runtime: fused, and quantised for it unless it is the float one."""
    passes: list[fxopt.contract.Pass] = [Clean(), Fuse()]
    if target != "float":
        passes += [PTQ(target="onnxruntime" if target == "onnxruntime" else "openvino"), QuantizeFreeze()]
    return fxopt.optimize(model, inputs, passes, devices=(), calibration_data=batches).module


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to quantisation noise in dB."""
    noise = (found - wanted).square().mean().clamp(min=1e-30)
    return float(10 * torch.log10(wanted.square().mean() / noise))


def size(executable: fxopt.Executable) -> int:
    """Bytes of the files that the runtime's own form of the model takes."""
    with tempfile.TemporaryDirectory() as directory:
        executable.save(Path(directory) / "model")
        files = [file for file in Path(directory).rglob("*") if file.suffix in _MODEL_FILES]
        return sum(file.stat().st_size for file in files)


def render(models: dict[str, Any]) -> str:
    """A Markdown table: speed-up over eager with its interval, SQNR, and how much smaller."""
    table = []
    for form in FORMS:
        cells = [form]
        for rows in models.values():
            row = rows[form]
            if "not_measured" in row:
                cells.append("-")
                continue
            text = f"{1 / row['ratio']:.2f} [{1 / row['high']:.2f}, {1 / row['low']:.2f}]"
            if form.endswith("int8"):
                text += f", {row['sqnr_db']:.0f} dB"
                text += f", {rows['float bytes'] / row['file_bytes']:.1f}x smaller" if row["file_bytes"] else ""
            cells.append(text)
        table.append(cells)
    return (
        "# What integers gain\n\nSpeed-up over eager float32 at batch 1 with its 95 % interval, SQNR against it, and "
        "the file against the float weights (`python benchmarks/quantization.py`). Random weights.\n\n"
        + tabulate(table, ["", *models], tablefmt="github", disable_numparse=True)
        + "\n"
    )


if __name__ == "__main__":
    main()
