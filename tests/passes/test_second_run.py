"""What one run made, a later run captures again: its passes find what the first one's have put in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt


class Model(nn.Module):
    """Layers of all the kinds that passes replace by modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        x = self.bn(self.conv(x)).relu().transpose(1, 2)
        x = self.recurrent(x)[0]
        return self.head(self.attention(x, x, x)[0])


TOKENS = torch.arange(10).view(2, 5)
FIRST = ["fuse", "lora", "sparsify{amount=0.5}", "qat", "fuse,sparsify{amount=0.5},lora,qat"]
SECOND = [
    ("lora", "lora-merge"),
    ("sparsify{amount=0.5}", "sparsify-bake"),
    ("fuse,qat", "quantize-freeze"),
    ("fuse", "qat"),
]


@pytest.mark.parametrize("passes", FIRST)
def test_modules_of_passes_stay_whole(passes: str) -> None:
    first = optimized(Model().eval(), passes)
    again = fxopt.capture(first, (TOKENS,))
    assert called(again.module) == called(first)
    assert again.coverage.call_sites == 1
    assert torch.equal(again.module(TOKENS), first(TOKENS))
    assert list(again.module.state_dict()) == list(first.state_dict())


@pytest.mark.parametrize(("first", "second"), SECOND)
def test_a_second_run_goes_on_from_the_first(first: str, second: str) -> None:
    module = optimized(Model().eval(), first)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    expected = module(TOKENS)
    at_once = fxopt.optimize(Model().eval(), TOKENS, f"{first},{second}", devices=())
    again = fxopt.optimize(module, TOKENS, second, devices=())
    made = {entry.pass_name: len(entry.changes) for entry in at_once.ledger.entries}[second]
    assert len(again.ledger.entries[0].changes) == made > 0
    if second != "qat":
        torch.testing.assert_close(again.module(TOKENS), expected)


def called(module: nn.Module) -> set[tuple[str, type[nn.Module]]]:
    names = [node.target for node in module.graph.nodes if node.op == "call_module"]
    return {(name, type(module.get_submodule(name))) for name in names}


def optimized(module: nn.Module, passes: str) -> nn.Module:
    torch.manual_seed(0)
    return fxopt.optimize(module, TOKENS, passes, devices=()).module
