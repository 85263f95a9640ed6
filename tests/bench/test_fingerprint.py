from __future__ import annotations

import dataclasses
import json

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
