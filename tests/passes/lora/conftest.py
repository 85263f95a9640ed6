"""What tests of adapters share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.torchvision_operators import declare_missing
from passes.lora.adapter import LowRank


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def peft() -> Any:
    declare_missing()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def randomize(module: nn.Module) -> None:
    """Give all adapters random values: from zero most of what could be wrong is not seen."""
    for child in module.modules():
        if isinstance(child, LowRank):
            with torch.no_grad():
                for parameter in child.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
