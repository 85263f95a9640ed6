"""attention: operators of torch in the place of formulas that are written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.graph import Region
from passes.attention.activations import recognise_activation
from passes.attention.einsum import recognise_product
from passes.attention.norms import recognise_norm
from passes.attention.sdpa import recognise_attention


@dataclass(frozen=True)
class Attention(Pass):
    """Recognises attention, normalisations and activations that are written out, and calls torch's operators.

        dropout(softmax(scale q k^T + mask)) v      =>  F.scaled_dot_product_attention
        (x - mean) / sqrt(var + eps) * w + b        =>  F.layer_norm, F.rms_norm without the mean
        0.5 x (1 + erf(x / sqrt(2))), x sigmoid(x)  =>  F.gelu, F.silu

    Products may be equations: each `einsum` that is a matrix product becomes one. Scale, masks of either kind, dropout
    (in training alone, by the flag of the module that had it), causal masks and heads that are repeated for groups are
    kept. What returns its attention weights stays as it is. A query all of whose keys are masked by minus infinity
    gives 0 where the formula gives NaN.

    It pays for memory and for long sequences: the scores are never written out. Where values are wider than keys,
    torch has no fast kernel on the CPU.
    """

    name: ClassVar[str] = "attention"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean",)
    for_speed: ClassVar[bool] = True

    norms: bool = field(default=True, metadata={"help": "recognise layer and root-mean-square normalisation"})
    activations: bool = field(default=True, metadata={"help": "recognise GELU and SiLU"})

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Offer each node to what might be the middle of a formula."""
        for node in list(region.graph.nodes):
            product = recognise_product(node, region)
            if product is not None:
                yield product
        kinds = [recognise_attention]
        kinds += [recognise_norm] if self.norms else []
        kinds += [recognise_activation] if self.activations else []
        for node in list(region.graph.nodes):
            for recognise in kinds:
                found = None if region.is_erased(node) else recognise(node, region)
                if found is not None:
                    yield found
