"""A record with everything in it, the same each time."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fxopt.bench import BeforeAfter, Comparison, Fingerprint, Size, Times, Verdict
from fxopt.capture.captured import Captured, Constant, Coverage, Guard, Opaque
from fxopt.contract import Change, Skip
from fxopt.engines import Ladder, Rung
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger, LedgerEntry, Proof
from fxopt.record import Record, build
from fxopt.sensitivity import Sensitivity

MACHINE = Fingerprint(
    cpu="Example CPU @ 2.50GHz",
    cpu_flags=("avx2", "avx512f"),
    cpu_capability="AVX512",
    cores=2,
    memory_bytes=2**34,
    os="Linux 6.1",
    python="3.11.7",
    fxopt="0.1.0",
    torch="2.13.0+cpu",
    blas="mkl 2024.2",
    onednn="3.12.0",
    threads=2,
    interop_threads=1,
)


def entry(pass_name: str, **facts: Any) -> LedgerEntry:
    defaults: dict[str, Any] = {"options": {}, "seconds": 0.03, "changes": (), "skips": (), "promise": "close"}
    return LedgerEntry(pass_name, **(defaults | facts))


def comparison(verdict: Verdict = Verdict.FASTER, ratio: float = 0.76, **facts: Any) -> Comparison:
    defaults: dict[str, Any] = {
        "low": 0.98 * ratio,
        "high": 1.02 * ratio,
        "noise_floor": 0.008,
        "margin": 0.02,
        "before_ms": 5.12,
        "after_ms": 5.12 * ratio,
        "device": "cpu",
        "threads": 2,
        "pairs": 30,
        "calls": 1,
        "preempted": 0.1,
        "times": Times((0.00512,) * 3, (0.00512 * ratio,) * 3, (0.00513,) * 3),
        "first_call": BeforeAfter(0.0123, 0.0119),
        "peak_memory": BeforeAfter(2_000_000, 1_500_000),
        "seconds": 4.5,
    }
    return Comparison(verdict=verdict, ratio=ratio, **(defaults | facts))


def captured(**facts: Any) -> Captured:
    defaults: dict[str, Any] = {
        "coverage": Coverage(0.97, 0.88, 1.0),
        "opaque": (Opaque("router", "x.item() depends on the input", "model.py:88"),),
        "guards": (Guard("x.shape[2] == 8", "model.py:12"),),
        "constants": (Constant("_constant_0", "float32 of 3", "model.py:14"),),
        "notes": ("a forward hook on 'stem' was recorded into the graph",),
        "seconds": 0.21,
    }
    return Captured(module=torch.nn.Module(), inputs=Inputs(), **(defaults | facts))  # type: ignore[arg-type]


class Lowered:
    """What a ladder asks of an executable."""

    reasons = (Skip("stem", "oneDNN has no kernels for torch.float64 here", "model.py:31"),)
    choices: ClassVar[dict[str, Any]] = {"layout": "channels_last", "kernels": {"stem": "packed"}}


def ladder() -> Ladder:
    lowered: Any = Lowered()
    rungs = (
        Rung("eager", {}, "", lowered, 0.0001, 1.2e-7, 0, comparison(Verdict.EQUIVALENT, 1.0)),
        Rung("onednn", {}, "", lowered, 0.62, 3.1e-7, 25_000_000, comparison(ratio=0.6)),
        *(
            Rung("openvino", {"precision": how}, dropped="OpenVINO is not installed; `pip install fxopt[openvino]`")
            for how in ("bf16", "mixed")
        ),
    )
    return Ladder("auto", "cpu", rungs, rungs[1], 0.01, 60.0, 41.5)


def example() -> Record:
    folds = tuple(
        Change(f"folded into 'layer{index}.conv'", f"layer{index}.bn", f"model.py:{40 + index}") for index in range(20)
    )
    fused = (Change("joined relu to 'stem'", "stem.relu", "model.py:31"),)
    left = (
        Skip("head.bn", "in training mode", "model.py:77"),
        Skip("tail.bn", "'tail.conv' is called twice", "model.py:78"),
        Skip("last.bn", "'last.conv' is called twice", "model.py:79"),
    )
    slower = (Change("folded into 'slow.conv'", "slow.bn", "model.py:39"),)
    proofs = (
        Proof("", True, "", folds + fused, comparison(ratio=0.8)),
        Proof("slow.bn", False, "the module is faster without it", slower, comparison(Verdict.SLOWER, 1.05)),
        Proof("stem.relu", True, "too small to tell; it goes with the pass", fused, comparison(Verdict.EQUIVALENT)),
    )
    ranking = (Sensitivity("stem.conv", 17.25, 0.0012, kept=True), Sensitivity("matmul", float("inf")))
    return build(
        target="examples/digits_cnn.py:model | a*b",
        inputs=Inputs.of(torch.zeros(1, 1, 8, 8)),
        machine=MACHINE,
        captured=captured(),
        ledger=Ledger(
            (
                LedgerEntry("fuse", {"activations": True}, 0.041, folds + fused, left, "close", 1.2e-7, proofs=proofs),
                LedgerEntry("qat", {"bits": 8}, 0.012, (), (), "changes", float("inf"), ranking=ranking),
            ),
            ("another batch size: there the model itself raises ValueError at model.py:12",),
        ),
        verified=True,
        latency={
            "cpu": comparison(notes=("10.0 % of the pairs were preempted",)),
            "cuda": "no CUDA device",
        },
        memory=BeforeAfter(
            Size(37_000, 300, 149_200, 3_640_000_000, 2_000_000), Size(36_700, 0, 146_800, 3_600_000_000, 1_500_000)
        ),
        engines=ladder(),
        metrics=BeforeAfter({"accuracy": 0.9733, "loss": 0.1}, {"accuracy": 0.9722, "loss": float("nan")}),
    )
