"""lora: low-rank adapters on any layer, trained, switched, merged, and exchanged with PEFT."""

from passes.lora.active import (
    disable,
    enable,
    mixed_batch,
    set_adapter,
    trainable_parameters,
    weighted,
)
from passes.lora.files import load_adapter, save_adapter
from passes.lora.fold import merge, unmerge
from passes.lora.inject import LoRA
from passes.lora.merging import LoRAMerge

__all__ = [
    "LoRA",
    "LoRAMerge",
    "disable",
    "enable",
    "load_adapter",
    "merge",
    "mixed_batch",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unmerge",
    "weighted",
]
