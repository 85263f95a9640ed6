"""All tensors of a module, each once, and back into place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.artifact.weights import collect, restore
from fxopt.errors import ArtifactError


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.randn(3), persistent=False)
        self.register_buffer("wide", torch.randn(1).expand(3))
        self.register_buffer("low", torch.tensor([]))


def test_everything_comes_back_and_tied_tensors_stay_tied():
    saved, again = Tied(), Tied()
    saved.low = torch.randn(4)
    weights, tied = collect(saved)
    assert tied == {"head.weight": "table.weight"}
    assert "scale" in weights
    restore(again, weights, tied, "result")
    assert again.head.weight is again.table.weight
    for name in ("scale", "wide", "low"):
        assert torch.equal(getattr(again, name), getattr(saved, name))
    assert torch.equal(again.head.weight, saved.head.weight)


def test_what_is_collected_is_independent():
    module = Tied()
    weights, _ = collect(module)
    before = weights["head.bias"].clone()
    module.head.bias.data.add_(1)
    assert torch.equal(weights["head.bias"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), "not in the result: head.bias"),
        (lambda w: w.update(more=torch.zeros(1)), "not in the module: more"),
        (lambda w: w.update({"head.bias": torch.zeros(6)}), "of another shape or dtype: head.bias"),
        (lambda w: w.update({"scale": torch.zeros(3).half()}), "of another shape or dtype: scale"),
    ],
)
def test_weights_of_another_module_change_nothing(change, message):
    weights, tied = collect(Tied())
    change(weights)
    module = Tied()
    before = module.table.weight.clone()
    with pytest.raises(ArtifactError) as raised:
        restore(module, weights, tied, "result")
    assert message in str(raised.value)
    assert "the weights in 'result' are not those of this module" in str(raised.value)
    assert torch.equal(module.table.weight, before)


def test_parameters_that_are_one_here_only_come_apart():
    weights, module = collect(Tied())[0], Tied()
    weights["head.weight"] = weights["table.weight"] + 1
    restore(module, weights, {}, "result")
    assert module.head.weight is not module.table.weight
    assert torch.equal(module.head.weight, module.table.weight + 1)
