"""Which quantiser costs the most: each one alone, against the model without any."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.errors import PassError
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize


@dataclass(frozen=True)
class Sensitivity:
    """What one quantiser costs.

    Attributes:
        name: its qualified name.
        sqnr_db: signal to quantisation noise of the model's outputs with this quantiser alone, in dB: the lower,
            the more it costs. Infinite where it changes nothing.
    """

    name: str
    sqnr_db: float


def sensitivity(module: nn.Module, data: Iterable[Any]) -> tuple[Sensitivity, ...]:
    """Rank the quantisers of a calibrated module, the costliest first.

    Outputs are compared in float64 with those of the module without any rounding. The module stays as it is.

    Args:
        module: what 'qat' or 'ptq' has been through, calibrated.
        data: batches of inputs, each a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        PassError: where there is nothing to rank, or no data.
    """
    trial = copy.deepcopy(module).eval()
    found = {name: child for name, child in trial.named_modules() if isinstance(child, FakeQuantize) and child.ready}
    batches = [Inputs.of(batch) for batch in data]
    if not found:
        raise PassError("sensitivity: no quantiser has a range; put 'qat' or 'ptq' in, and calibrate")
    if not batches:
        raise PassError("sensitivity: the data is empty; give an iterable of inputs")
    for quantizer in found.values():
        quantizer.ready = False  # it passes on what it is given
    wanted = _outputs(trial, batches)
    ranked = []
    for name, quantizer in found.items():
        quantizer.ready = True
        ranked.append(Sensitivity(name, _sqnr(_outputs(trial, batches), wanted)))
        quantizer.ready = False
    return tuple(sorted(ranked, key=lambda one: one.sqnr_db))


@torch.no_grad()
def _outputs(module: nn.Module, batches: list[Inputs]) -> torch.Tensor:
    values = []
    for batch in batches:
        leaves = pytree.tree_leaves(module(*batch.args, **batch.kwargs))
        values += [leaf.double().flatten() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return torch.cat(values)


def _sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    noise = (found - wanted).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(wanted.square().sum() / noise))
