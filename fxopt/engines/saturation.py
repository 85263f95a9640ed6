"""Integer products that saturate: on CPUs without VNNI, x86's kernels add two products of bytes in 16 bits.

An unsigned byte times a signed one, twice, reaches 2 * 255 * 127 = 64770, and the sum stops at 32767. Weights of 7 bits
keep within it, as 2 * 255 * 64 = 32640. oneDNN's "Nuances of int8 computations" and onnxruntime's page on quantisation
tell of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fxopt.bench.fingerprint import fingerprint
from fxopt.contract import Skip
from fxopt.modules import FakeQuantize

_BYTE = 8
_WHY = "this CPU (no VNNI) adds two products of bytes in 16 bits, which saturate"
_REMEDY = "`weights=int7` of 'qat' and 'ptq' keeps within them"
SATURATES = Skip("", f"{_WHY}, so outputs may differ from the simulation: {_REMEDY}")
AVOIDED = Skip("", f"{_WHY}, so weights are held as unsigned bytes, which is slower; {_REMEDY}, at full speed")


def saturates(module: nn.Module) -> bool:
    """Whether the CPU at hand may saturate where it multiplies by the quantised weights of `module`."""
    wide = any(
        isinstance(child, FakeQuantize) and child.observer == "current" and child.bits == _BYTE
        for child in module.modules()
    )
    return wide and adds_in_16_bits(fingerprint().cpu_flags)


def adds_in_16_bits(flags: Sequence[str]) -> bool:
    """Whether a CPU with these instruction sets has none that adds products of bytes in 32 bits; ARM's all do."""
    return "sse4_2" in flags and not {"avx512_vnni", "avx_vnni"} & {*flags}
