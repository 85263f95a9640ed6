"""A record of `fxopt ci` with everything in it, the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np


def example() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    base = (0.005 * np.exp(0.03 * rng.standard_normal(120))).round(9).tolist()
    head = (0.0061 * np.exp(0.03 * rng.standard_normal(120))).round(9).tolist()
    nodes = [
        {"op": "placeholder", "what": "x", "name": "x", "source": "", "file": ""},
        {
            "op": "call_module",
            "what": "FusedConv",
            "name": "stem.0",
            "source": "model.py:12",
            "file": "../net/model.py",
        },
        {
            "op": "call_module",
            "what": "BatchNorm2d",
            "name": "stem.1",
            "source": "model.py:13",
            "file": "../net/model.py",
        },
        {"op": "call_module", "what": "Linear", "name": "fc", "source": "model.py:15", "file": "../net/model.py"},
    ]
    latency = {
        "verdict": "REGRESSION",
        "base_ms": 5.0,
        "head_ms": 6.1,
        "ratio": 1.22,
        "low": 1.2,
        "high": 1.24,
        "noise_floor": 0.011,
        "pairs": 120,
        "windows": 2,
        "processes": 18,
        "calls": 1,
        "preempted": 0.1,
        "clocks_mhz": None,
        "seconds": 9.0,
        "measuring_seconds": 8.5,
        "times": {"base": base, "head": head, "again": base[::-1]},
    }
    passes = [
        {
            "name": "fuse",
            "changes": [{"what": "folded into 'stem.0'", "where": "stem.1", "source": "model.py:13"}],
            "skips": [{"where": "head.bn", "reason": "'head.conv' is used twice <b>", "source": "model.py:20"}],
            "relative_error": 1e-7,
        }
    ]
    check = {"name": "size", "status": "failed", "before": "10 bytes", "after": "99 bytes", "message": "890.0 % more"}
    skipped = {
        "name": "output error",
        "status": "not checked",
        "before": "",
        "after": "0",
        "message": "no limit is set",
    }
    slow = {
        "name": "digits & letters",
        "target": "model.py:Net",
        "device": "cpu",
        "spec": "fuse",
        "engine": "",
        "inputs": "1x3x48x48 float32",
        "threads": 1,
        "threshold": 0.05,
        "latency": latency,
        "checks": [check, skipped, check | {"name": "accuracy", "status": "ok", "message": ""}],
        "cause": {
            "pass": "fuse",
            "what": "'head.bn' (model.py:20) is no longer folded into 'head.conv': 'head.conv' is used twice",
            "ladder": [{"after": "the model itself", "ratio": 1.001}, {"after": "fuse", "ratio": 1.22}],
        },
        "passes": passes,
        "graphs": {"base": [*nodes[:2], nodes[3]], "head": nodes},
        "notes": [],
        "verdict": "REGRESSION",
        "seconds": 20.0,
    }
    empty = {"latency": None, "checks": [], "cause": None, "passes": [], "graphs": None}
    absent = slow | empty | {"name": "new", "target": "new.py", "verdict": "new", "notes": ["not in the base"]}
    wandering = slow | {
        "name": "noisy",
        "checks": [],
        "cause": None,
        "verdict": "INCONCLUSIVE",
        "latency": latency | {"verdict": "INCONCLUSIVE"},
        "notes": ["the base differs from itself by up to 30.0 % here"],
    }
    return {
        "schema": "1.0",
        "kind": "ci",
        "base": {"revision": "origin/main", "commit": "1234567890"},
        "head": {
            "commit": "abcdef0123",
            "dirty": True,
            "uncommitted": ["model.py", "layers.py", "a.py", "b.py"],
            "directory": "bench",
        },
        "machine": {
            "cpu": "Example CPU",
            "cpu_flags": [],
            "cores": 2,
            "cpu_capability": "AVX512",
            "memory_bytes": None,
            "os": "L",
            "python": "3.12",
            "fxopt": "0.1",
            "torch": "2.13",
            "blas": "mkl",
            "threads": 1,
            "interop_threads": 1,
            **dict.fromkeys(("onednn", "gpu", "gpu_memory_bytes", "gpu_driver", "cuda", "cudnn")),
        },
        "targets": [slow, absent, wandering],
    }
