"""The facts about a computer that make two latencies comparable, or not."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.version import __version__

_TELLING_FLAGS = (
    "sse4_2 avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_int8 amx_fp16 neon asimd asimddp fphp bf16 i8mm sve sve2 sme"
).split()


@dataclass(frozen=True)
class Fingerprint:
    """What a latency depends on besides the model.

    Attributes:
        cpu: model name.
        cpu_flags: the instruction sets that matter to kernels, of those the CPU has.
        cpu_capability: the one that torch's kernels use, "AVX512".
        cores: that this process may run on.
        memory_bytes: of main memory; None where unknown.
        os: system and release.
        python: version.
        fxopt: version.
        torch: version with its build.
        blas: library and version.
        onednn: version; None where torch has none.
        threads: that torch runs inside of an operator.
        interop_threads: how many operators torch may run at once.
        gpu: name; None where there is no CUDA device.
        gpu_memory_bytes: of its memory.
        gpu_driver: version.
        cuda: version that torch was built with.
        cudnn: version.
    """

    cpu: str
    cpu_flags: tuple[str, ...]
    cpu_capability: str
    cores: int
    memory_bytes: int | None
    os: str
    python: str
    fxopt: str
    torch: str
    blas: str
    onednn: str | None
    threads: int
    interop_threads: int
    gpu: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None


def fingerprint(device: torch.device | str = "cuda") -> Fingerprint:
    """The fingerprint of this computer and process, as it is now.

    Args:
        device: which of several GPUs is told of, "cuda:1"; the current one for any other device.
    """
    cpu, flags = _cpu()
    config = torch.__config__.show()
    gpu = torch.cuda.is_available()
    which = torch.device(device) if torch.device(device).type == "cuda" else torch.device("cuda")
    return Fingerprint(
        cpu=cpu,
        cpu_flags=flags,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        fxopt=__version__,
        torch=torch.__version__,
        blas=_blas(config),
        onednn=_found(r"MKL-DNN v([\w.]+)|oneDNN v([\w.]+)", config),
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        gpu=torch.cuda.get_device_name(which) if gpu else None,
        gpu_memory_bytes=int(torch.cuda.get_device_properties(which).total_memory) if gpu else None,
        gpu_driver=_found(r"Module.*?\s(\d+\.[\d.]+)\s", _text("/proc/driver/nvidia/version")) if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        cudnn=str(torch.backends.cudnn.version()) if gpu else None,
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    text = _text("/proc/cpuinfo")
    name = _found(r"(?m)^model name\s*:\s*(.+)$", text) or platform.processor() or platform.machine()
    has = (_found(r"(?m)^(?:flags|Features)\s*:\s*(.+)$", text) or "").split()
    return name, tuple(flag for flag in _TELLING_FLAGS if flag in has)


def _memory() -> int | None:
    kibibytes = _found(r"(?m)^MemTotal:\s*(\d+) kB", _text("/proc/meminfo"))
    return None if kibibytes is None else int(kibibytes) * 1024


def _blas(config: str) -> str:
    name = _found(r"BLAS_INFO=(\w+)", config) or "unknown"
    version = _found(r"Math Kernel Library Version ([\w.]+)", config) if name == "mkl" else None
    return f"{name} {version}" if version else name


def _found(pattern: str, text: str) -> str | None:
    """The group that matched first, stripped."""
    match = re.search(pattern, text)
    return next((group.strip() for group in match.groups() if group), None) if match else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
