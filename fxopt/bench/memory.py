"""The memory that one forward needs, and that the process has."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.bench.cuda import cuda_peak_memory
from fxopt.bench.surroundings import visible_operators
from fxopt.bench.watching import Watch


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call holds at its peak, beyond what was held before it: no weights and no inputs.

    On CUDA it is what torch's allocator says, scratch space of the kernels included. On the CPU it is the sum of
    the tensors that are alive at once and that this call made, each storage counted once; what a kernel takes and
    gives back by itself is not seen there, and torch.nn's encoder layers run operator by operator for it. The
    resident size of the process would show it all, but it also holds what earlier calls left to the allocator.
    """
    if device.type == "cuda":
        return cuda_peak_memory(call, device)
    with visible_operators(), _LiveStorages() as live:
        result = call()
    del result
    return int(live.peak)


def resident_bytes(*, peak: bool = False) -> int | None:
    """Bytes of this process that are in memory, or were at most, as Linux tells them; None where nothing does.

    The peak starts anew with the program, unlike that of `rusage`.
    """
    return _said("/proc/self/status", "VmHWM:" if peak else "VmRSS:")


def available_bytes() -> int | None:
    """Bytes that this machine can still give to a process, caches of files included; None where Linux does not tell."""
    return _said("/proc/meminfo", "MemAvailable:")


def _said(file: str, name: str) -> int | None:
    """A size in one of Linux's files about itself, in bytes."""
    try:
        lines = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


class _LiveStorages(Watch):
    """Adds up the storages that operators return, for as long as each is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A storage that came in was there before this call, or is counted already.
            if _key(storage) not in known and _key(storage) not in self._alive:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = _key(storage), storage.nbytes()

        def gone(_: object) -> None:
            self._held -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self._held += size
        self.peak = max(self.peak, self._held)


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
