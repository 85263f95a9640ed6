"""sparsify: weights held at zero by masks, along a schedule, until they are baked."""

from passes.sparsify.bake import SparsifyBake, bake
from passes.sparsify.mask import Masked, PrunedMask, masked_weights
from passes.sparsify.scheduler import SparsityScheduler
from passes.sparsify.sparsify import Sparsify

__all__ = ["Masked", "PrunedMask", "Sparsify", "SparsifyBake", "SparsityScheduler", "bake", "masked_weights"]
