"""The library of passes that comes with fxopt."""

from fxopt.contract import Pass
from passes.audit import Audit
from passes.clean import Clean
from passes.fuse import Fuse
from passes.lora import LoRA, LoRAMerge
from passes.qat import PTQ, QAT, QuantizeFreeze

__all__ = ["PASSES", "PTQ", "QAT", "Audit", "Clean", "Fuse", "LoRA", "LoRAMerge", "QuantizeFreeze"]

PASSES: tuple[type[Pass], ...] = (Clean, Fuse, QAT, PTQ, QuantizeFreeze, LoRA, LoRAMerge, Audit)
