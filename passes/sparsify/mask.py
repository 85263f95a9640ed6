"""The mask of one weight, together with what it was chosen by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fxopt.modules import Mask
from fxopt.modules.mask import SUFFIX
from passes.sparsify.pattern import unview, view
from passes.sparsify.plan import TRAINED, Plan


class PrunedMask(Mask):
    """A `Mask` that knows its plan.

    Args:
        weight: what is masked.
        outputs: the axis of the weight that counts outputs.
        plan: what it was asked to become.
        groups: of a convolution.

    Attributes:
        input_norm: for Wanda, the length of what each input saw, (outputs or 1, 1, inputs); else None.
        norm: for bn-scale, the batch norm behind the layer, in a list so that it is no child; else empty.
        ready: whether its zeros were chosen.
    """

    input_norm: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, outputs: int, plan: Plan, groups: int = 1):
        super().__init__(weight)
        self.outputs = outputs
        self.plan = plan
        self.groups = groups
        self.norm: list[nn.Module] = []
        self.ready = False
        rows, _, inputs = view(weight, outputs).shape
        wanda = torch.zeros(rows, 1, inputs, device=weight.device) if plan.criterion == "wanda" else None
        self.register_buffer("input_norm", wanda)
        if plan.criterion in TRAINED:
            self.score = nn.Parameter(torch.zeros_like(weight), requires_grad=weight.requires_grad)

    def keep(self, kept: torch.Tensor) -> None:
        """Take the mask from one as (outputs, taps, inputs)."""
        self.mask.copy_(unview(kept, self.mask.shape, self.outputs))
        self.ready = True


@dataclass(frozen=True)
class Masked:
    """A mask where it is in a module.

    Attributes:
        name: what reports call it: the layer, or the parameter where it is not called `weight`.
        owner: the module that has the parameter.
        leaf: name of the parameter there.
        mask: its mask.
    """

    name: str
    owner: nn.Module
    leaf: str
    mask: PrunedMask

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, whatever is there now."""
        found = self.owner._parameters[self.leaf]
        assert found is not None
        return found

    @torch.no_grad()
    def apply(self) -> None:
        """Write zeros into the parameter where the mask has them."""
        self.weight.masked_fill_(~self.mask.mask, 0)


def masked_weights(module: nn.Module) -> list[Masked]:
    """All masks of a module that the pass has put there, each once."""
    return list(_found(module))


def _found(module: nn.Module) -> Iterator[Masked]:
    seen = set[int]()
    for path, owner in module.named_modules():
        for name, child in owner._modules.items():
            if isinstance(child, PrunedMask) and id(child) not in seen:
                seen.add(id(child))
                leaf = name.removesuffix(SUFFIX)
                yield Masked(layer_name(path, leaf), owner, leaf, child)


def layer_name(path: str, leaf: str) -> str:
    """What a parameter's layer is called."""
    return path if leaf == "weight" and path else f"{path}.{leaf}" if path else leaf
