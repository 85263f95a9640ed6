from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from fxopt.bench import fingerprint
from fxopt.bench.fingerprint import _blas, _found


def test_facts_of_this_computer() -> None:
    found = fingerprint()
    assert found == fingerprint()
    assert found.cpu and found.os and found.cores >= 1
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert (found.gpu is not None) == torch.cuda.is_available()
    json.dumps(dataclasses.asdict(found))


def test_reading_of_what_others_print() -> None:
    mkl = "Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build\n - Build settings: BLAS_INFO=mkl, X=1"
    assert _blas(mkl) == "mkl 2024.2"
    assert _blas("BLAS_INFO=open, X=1") == "open"
    assert _blas("") == "unknown"
    driver = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x)"
    assert _found(r"Module.*?\s(\d+\.[\d.]+)\s", driver) == "580.65.06"


def test_of_several_gpus_the_one_that_is_measured_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {None: SimpleNamespace(name="first", total_memory=1), 1: SimpleNamespace(name="second", total_memory=2)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpus[device.index])
    for device, name in (("cuda:1", "second"), ("cuda", "first"), ("cpu", "first")):
        found = fingerprint(device)
        assert (found.gpu, found.gpu_memory_bytes) == (name, {"first": 1, "second": 2}[name])
