"""FX604: a mask on a weight that no kernel profits from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from fxopt.findings import Severity
from fxopt.modules import Mask
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule


@rule("FX604", Severity.NOTE)
def idle_mask(evidence: Evidence) -> Iterator[Found]:
    """A mask on a weight that no kernel profits from.

    The mask is multiplied into the weight at each call, and then a dense product computes all of its zeros: sparse
    and no faster.

    Bad:
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)

    Good:
        prune.l1_unstructured(self.fc1, "weight", amount=0.9)
        prune.remove(self.fc1, "weight")

    Fix: once it is trained, bake the mask into the weight (`sparsify-bake`, `prune.remove`), and run the zeros by
    `fxopt.lower(model, inputs, "sparse")`, which measures where they pay; below 70 % few do.
    """
    for path, module in evidence.modules:
        if isinstance(module, Mask):
            continue
        for leaf, mask in _masks(module):
            zeros = 1 - float(mask.count_nonzero()) / max(mask.numel(), 1)
            if zeros > 0:
                what = f"{path}.{leaf}" if path else leaf
                message = f"a mask is multiplied into '{what}' at each call, and its {zeros:.0%} zeros are computed"
                yield Found(message, place_of(evidence, path, leaf), path)


def _masks(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The names of a module's masked parameters, and the masks: fxopt's, torch's, and what is surely one."""
    for name, child in module._modules.items():
        if isinstance(child, Mask) and not child.mask.is_meta:
            yield name.removesuffix("_mask"), child.mask
    pruned = {hook._tensor_name for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)}
    for name in sorted(pruned):
        yield name, module._buffers[f"{name}_mask"]  # type: ignore[misc]
    shapes = {p.shape: name for name, p in module._parameters.items() if p is not None and p.dim() > 1}
    for name, buffer in module._buffers.items():
        if buffer is None or buffer.is_meta or name.removesuffix("_mask") in pruned or "mask" not in name:
            continue
        if buffer.shape in shapes and bool(((buffer == 0) | (buffer == 1)).all()):
            yield shapes[buffer.shape], buffer
