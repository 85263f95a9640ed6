"""FX604 on the masks of the pass `sparsify`."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.findings import Subject
from fxopt.inputs import Inputs
from passes import sparsify
from passes.audit import Audit
from tests.passes.sparsify.test_masks import masked


def messages(module: nn.Module, x: torch.Tensor) -> list[str]:
    found = Audit().inspect(Subject("masked", module, Inputs((x,))))
    return [finding.message for finding in found.findings if finding.rule == "FX604"]


def test_masks_are_told_of_until_they_are_baked() -> None:
    x = torch.randn(2, 8)
    module = masked(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), (x,), "sparsify{amount=0.5}")
    assert messages(module, x) == [
        f"a mask is multiplied into '{index}.weight' at each call, and its 50% zeros are computed" for index in (0, 1)
    ]
    sparsify.bake(module)
    assert messages(module, x) == []
