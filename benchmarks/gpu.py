"""What each way to run a model gains on a CUDA device, each held against eager.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json] [--seconds 10] [--batch 1 32] [MODEL ...]

Every comparison is `fxopt.bench.compare_on`: events on a full queue with the wall time beside them, warm and cold L2
cache, replays of a CUDA graph, and the clocks of both sides. Models come from torchvision with random weights. The
record is written after each model; without a GPU this says so and exits with 0.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt import Inputs, bench, record, spec
from fxopt.pipeline import replay, run_passes
from fxopt.relative_error import relative_error
from fxopt.torchvision_operators import declare_missing

MODELS = ("resnet18", "resnet50", "mobilenet_v3_large", "convnext_tiny", "vit_b_16")
Run = Callable[..., Any]


def main() -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one comparison")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    reason = bench.unavailable("cuda")
    if reason is not None:
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 0
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for batch in options.batch:
            rows.append(measure(name, batch, options.seconds))
            found = {"machine": dataclasses.asdict(bench.fingerprint()), "rows": rows}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(record.plain(found), indent=1) + "\n", encoding="utf-8")
            print(f"{name} at {batch}: {summary(rows[-1])}", file=sys.stderr)
    return 0


def measure(name: str, batch: int, seconds: float) -> dict[str, Any]:
    """All arms of one model at one batch size."""
    declare_missing()
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval().cuda()
    inputs = Inputs((torch.randn(batch, 3, 224, 224, device="cuda"),))
    with torch.no_grad():
        expected = model(*inputs.args)
    arms: dict[str, Any] = {}
    for arm, make in ARMS.items():
        began = time.perf_counter()
        try:
            run = make(model, inputs)
            with torch.no_grad():
                error = relative_error(expected, run(*inputs.args).clone())
            torch.cuda.synchronize()
            build_seconds = time.perf_counter() - began
            compared = bench.compare_on("cuda", model, run, inputs, budget_seconds=seconds)
            arms[arm] = {"build_seconds": build_seconds, "relative_error": error, "rows": _written(compared)}
        except Exception as failure:  # an arm that this GPU or torch lacks is a result too
            arms[arm] = {"failed": f"{type(failure).__name__}: {failure}"[:400]}
    return {"model": name, "batch": batch, "inputs": inputs.describe(), "arms": arms}


def _written(compared: Mapping[str, bench.Comparison | str]) -> dict[str, Any]:
    return {
        row: {"not_measured": found} if isinstance(found, str) else record.of_comparison(found)
        for row, found in compared.items()
    }


def summary(row: Mapping[str, Any]) -> str:
    """The speed-up of each arm with a warm cache."""
    parts = []
    for arm, found in row["arms"].items():
        latency = found.get("rows", {}).get("cuda", {})
        parts.append(f"{arm} {1 / latency['ratio']:.2f}x" if "ratio" in latency else f"{arm} -")
    return ", ".join(parts)


class Cast(nn.Module):
    """A model in another dtype, between inputs and outputs in float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cast, run, cast back."""
        found: torch.Tensor = self.model(x.to(self.dtype, memory_format=torch.channels_last))
        return found.float()


def _fused(model: nn.Module, inputs: Inputs) -> nn.Module:
    return replay(model, inputs, spec.parse("clean,fuse"))


def _channels_last(model: nn.Module, inputs: Inputs) -> Run:
    fused: nn.Module = copy.deepcopy(_fused(model, inputs)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fused


def _lowered(engine: str, **options: Any) -> Callable[[nn.Module, Inputs], Run]:
    def arm(model: nn.Module, inputs: Inputs) -> Run:
        # Its own call: a copy of an executable would have to be built again.
        return fxopt.lower(_fused(model, inputs), inputs, engine, **options).forward

    return arm


def _integers(model: nn.Module, inputs: Inputs) -> Run:
    """Calibrated on the inputs alone, which its speed does not depend on."""
    captured = fxopt.capture(model, inputs.args, inputs.kwargs)
    run_passes(captured, spec.parse("clean,fuse,ptq"), None, [inputs])
    return fxopt.lower(captured.module, inputs, "cublas").forward


def _compiled(mode: str | None) -> Callable[[nn.Module, Inputs], Run]:
    def arm(model: nn.Module, inputs: Inputs) -> Run:
        compiled = torch.compile(copy.deepcopy(model), mode=mode)
        return lambda *args: compiled(*args)

    return arm


def _quantized(config: str) -> Callable[[nn.Module, Inputs], Run]:
    """By torchao, where it is installed."""

    def arm(model: nn.Module, inputs: Inputs) -> Run:
        from torchao import quantization  # type: ignore[import-not-found, import-untyped, unused-ignore]

        quantized = copy.deepcopy(model)
        quantization.quantize_(quantized, getattr(quantization, config)())
        return quantized

    return arm


ARMS: Mapping[str, Callable[[nn.Module, Inputs], Run]] = {
    "fused": _fused,
    "fused, channels_last": _channels_last,
    "bf16": lambda model, inputs: Cast(_fused(model, inputs), torch.bfloat16),
    "fp16": lambda model, inputs: Cast(_fused(model, inputs), torch.float16),
    "cast pass, bf16": lambda model, inputs: replay(model, inputs, spec.parse("clean,fuse,cast")),
    "cudnn": _lowered("cudnn"),
    "cudnn, TF32": _lowered("cudnn", tf32=True),
    "cudagraph around cudnn": _lowered("cudagraph"),
    "torch.compile": _compiled(None),
    "torch.compile, reduce-overhead": _compiled("reduce-overhead"),
    "cublas, int8": _integers,
    "cublas, fp8": _lowered("cublas", precision="fp8"),
    "torchao, int8": _quantized("Int8DynamicActivationInt8WeightConfig"),
    "torchao, fp8": _quantized("Float8DynamicActivationFloat8WeightConfig"),
}


if __name__ == "__main__":
    sys.exit(main())
