"""Attention in ONNX files: keys are transposed as one operator."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.relative_error import relative_error
from tests.engines.test_others import needs


class Attention(nn.Module):
    """Of heads that share keys by groups, where `groups` is more than 1."""

    def __init__(self, masked: bool = False, causal: bool = False, groups: int = 1):
        super().__init__()
        self.query, self.keys = nn.Linear(16, 16), nn.Linear(16, 32 // groups)
        self.masked, self.causal, self.groups = masked, causal, groups

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
        key, value = self.keys(x).chunk(2, -1)
        key, value = (each.unflatten(-1, (4 // self.groups, 4)).transpose(1, 2) for each in (key, value))
        mask = x[:, None, :, :5].sigmoid() if self.masked else None
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=self.causal, enable_gqa=self.groups > 1
        )


@pytest.mark.parametrize(
    "model",
    [Attention(), Attention(masked=True), Attention(causal=True), Attention(groups=2)],
    ids=["plain", "masked", "causal", "grouped"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_keys_are_transposed_by_one_operator(model: Attention, batch: int, tmp_path: Path) -> None:
    needs("onnxruntime")
    import onnx

    torch.manual_seed(0)
    x = torch.randn(batch, 5, 16)
    executable = fxopt.lower(model.eval(), x, "onnxruntime")
    with torch.no_grad():
        assert relative_error(model(x), executable(x)) < 1e-5
    executable.save(tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes)
    orders = [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
    swaps = [order for order in orders if order[-2:] == [len(order) - 1, len(order) - 2]]
    assert swaps == [[0, 1, 3, 2]]
    if not model.causal and model.groups == 1:
        assert kinds["Shape"] == 0, "nothing is left of the shapes that were computed"


class Batches(nn.Module):
    """Makes a batch of matrices of what it is given, transposes them, and goes on with a shape of its own."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 4, 6).transpose(1, 2).reshape(self.shape)


class OtherMatrices(nn.Module):
    """The matrices are not those of the last two axes, though it is put back as if they were."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(3, -1, 6).transpose(1, 2).reshape(3, x.shape[0], 6, 4) + 1


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (Batches(2, 3, 4, 6), (2, 3, 4, 6)),
        (Batches(3, 2, 6, 4), (2, 3, 4, 6)),
        (Batches(2, 3, 6, 4), (2, 3, 4, 6)),
        (Batches(6, 24), (6, 24)),
        (Batches(144), (144,)),
        (OtherMatrices(), (2, 3, 4, 6)),
    ],
)
def test_what_else_is_transposed_stays_right(model: nn.Module, given: tuple[int, ...]) -> None:
    needs("onnxruntime")
    x = torch.randn(given)
    assert torch.equal(fxopt.lower(model.eval(), x, "onnxruntime")(x), model(x))
