"""The library of passes that comes with fxopt."""

from fxopt.contract import Pass
from passes.attention import Attention
from passes.audit import Audit
from passes.cast import Cast
from passes.clean import Clean
from passes.fuse import Fuse
from passes.layout import Layout
from passes.lora import LoRA, LoRAMerge
from passes.merge import Merge
from passes.qat import PTQ, QAT, QuantizeFreeze
from passes.sparsify import Sparsify, SparsifyBake

__all__ = [
    "PASSES",
    "PTQ",
    "QAT",
    "Attention",
    "Audit",
    "Cast",
    "Clean",
    "Fuse",
    "Layout",
    "LoRA",
    "LoRAMerge",
    "Merge",
    "QuantizeFreeze",
    "Sparsify",
    "SparsifyBake",
]

PASSES: tuple[type[Pass], ...] = (
    Clean,
    Merge,
    Attention,
    Layout,
    Fuse,
    Cast,
    Sparsify,
    SparsifyBake,
    QAT,
    PTQ,
    QuantizeFreeze,
    LoRA,
    LoRAMerge,
    Audit,
)
