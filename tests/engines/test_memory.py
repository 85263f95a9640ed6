"""Freed memory goes back to the system, also from between what lives, and what a build needs no more is freed."""

from __future__ import annotations

import ctypes
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.engines import eager
from fxopt.engines.memory import hand_back

BLOCK = 64 << 10


def resident_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be asked to")
def test_memory_freed_between_living_blocks_is_handed_back() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("this C library has no malloc_trim")
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [libc.malloc(BLOCK) for _ in range(1024)]
    for block in blocks:
        libc.memset(block, 1, BLOCK)
    for block in blocks[::2]:
        libc.free(block)
    before = resident_bytes()
    hand_back()
    freed = before - resident_bytes()
    for block in blocks[1::2]:
        libc.free(block)
    assert freed > 0.8 * 512 * BLOCK


def test_a_module_that_nobody_else_holds_is_gone_when_the_engine_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    def captured() -> nn.Module:
        module = fxopt.capture(nn.Linear(2048, 2048).eval(), (torch.randn(1, 2048),)).module
        held.append(weakref.ref(module))
        return module

    def build(self: eager.Eager, *arguments: Any) -> Any:
        alive.append(held[0]() is not None)
        return real(self, *arguments)

    real = eager.Eager.build
    monkeypatch.setattr(eager.Eager, "build", build)
    fxopt.lower(captured(), torch.randn(1, 2048), "eager")
    assert alive == [False]
