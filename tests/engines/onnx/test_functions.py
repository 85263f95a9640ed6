"""Functions that torch's ONNX exporter refuses, or computes otherwise, reach ONNX files as others."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.engines.onnx.functions import ExportedOtherwise
from fxopt.relative_error import relative_error
from tests.engines.test_others import EXPORTING


class OneHead(nn.Module):
    """Attention of as many axes as its input has."""

    def __init__(self, masked: bool):
        super().__init__()
        self.project, self.masked = nn.Linear(16, 48), masked

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        mask = x[..., :5] > 0 if self.masked else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=not self.masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(5, 16), (2, 5, 16), (2, 3, 4, 5, 16), (2, 2, 3, 4, 5, 16)],
    ids=["two axes", "three axes", "five axes", "six axes"],
)
@pytest.mark.parametrize("engine", EXPORTING)
def test_attention_of_fewer_or_more_axes(engine: str, shape: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(0)
    model = OneHead(masked).eval()
    executable = fxopt.lower(model, torch.randn(shape).abs(), engine)
    x = torch.randn(shape if len(shape) == 2 else (3, *shape[1:])).abs()
    x[..., 2:4, 1] *= -1
    with torch.no_grad():
        assert relative_error(model(x), executable(x)) < 1e-5


@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("engine", EXPORTING)
def test_a_mask_of_attention_of_five_axes(engine: str, axes: int) -> None:
    torch.manual_seed(0)
    mask = torch.rand((2, 3, 4, 5, 5)[-axes:]) > 0.3
    mask[..., 0] = True

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x + 1, 2 * x, mask)

    x = torch.randn(2, 3, 4, 5, 16)
    assert relative_error(Masked()(x), fxopt.lower(Masked().eval(), x, engine)(x)) < 1e-5


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("engine", EXPORTING)
def test_heads_may_be_grouped_by_one(engine: str, heads: int) -> None:
    torch.manual_seed(0)

    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x[:, :heads] + 1, x[:, :heads], enable_gqa=True)

    x = torch.randn(2, 4, 5, 16)
    assert relative_error(Grouped()(x), fxopt.lower(Grouped().eval(), x, engine)(x)) < 1e-5


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("engine", EXPORTING)
def test_a_row_of_attention_that_is_masked_throughout_gives_zeros(engine: str, adds: bool) -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            return F.scaled_dot_product_attention(x, x + 1, 2 * x, added if adds else mask)

    x, mask = torch.randn(2, 3, 5, 16), torch.ones(2, 1, 5, 5).tril().bool()
    executable = fxopt.lower(Padded().eval(), (x, mask), engine)
    mask[1, :, :2] = False
    found = executable(x, mask)
    assert not found[1, :, :2].any()
    assert relative_error(Padded()(x, mask), found) < 1e-5


class Means(nn.Module):
    """What neighbours of nodes are on average, as a graph network adds it up."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        into, rows = torch.arange(12.0).reshape(4, 3), index[:, None].expand(-1, 3)
        with_own = into.scatter_reduce(0, rows, x, "mean")
        of_others = torch.scatter_reduce(into, 0, rows, x, "mean", include_self=False)
        floored = (into * 5).long().scatter_reduce_(0, rows, (x * 9).long(), reduce="mean")
        return torch.cat([with_own, of_others, floored])


@pytest.mark.parametrize("engine", EXPORTING)
def test_means_are_scattered(engine: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 3), torch.tensor([0, 1, 0, 3, 0, 1])
    executable = fxopt.lower(Means().eval(), inputs, engine)
    assert relative_error(Means()(*inputs), executable(*inputs)) < 1e-5


class Translator(nn.Module):
    """`nn.Transformer` with a causal mask that is not said to be one."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.transformer(
            source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        )


@pytest.mark.parametrize("engine", EXPORTING)
def test_a_transformer_is_not_asked_whether_its_mask_is_causal(engine: str) -> None:
    torch.manual_seed(0)
    module = Translator().eval()
    executable = fxopt.lower(module, (torch.randn(2, 5, 16), torch.randn(2, 4, 16)), engine)
    assert executable.reasons == ()
    inputs = torch.randn(3, 5, 16), torch.randn(3, 4, 16)
    assert relative_error(module(*inputs), executable(*inputs)) < 1e-4


class Experts(nn.Module):
    """Each row goes to the expert that its first feature names."""

    def __init__(self, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        experts = len(self.weight)
        expert = x[:, 0].abs().clamp(max=experts - 1).long()
        order = expert.argsort()
        ends = (expert[:, None] <= torch.arange(experts)).sum(0).int()
        return F.grouped_mm(x[order], self.weight, offs=ends)[order.argsort()]


@pytest.mark.parametrize("experts", [4, 12], ids=["more rows than experts", "fewer rows than experts"])
@pytest.mark.parametrize("engine", EXPORTING)
def test_experts_take_their_rows(engine: str, experts: int) -> None:
    torch.manual_seed(0)
    model = Experts(experts).eval()
    executable = fxopt.lower(model, 5 * torch.randn(8, 16), engine)
    assert not executable.reasons, "the number of rows is free"
    for rows in (8, 3, 20):
        x = 5 * torch.randn(rows, 16)
        with torch.no_grad():
            assert relative_error(model(x), executable(x)) < 1e-5


def test_other_products_by_groups_stay() -> None:
    a, b = torch.randn(3, 8, 16), torch.randn(3, 16, 8)
    found = F.grouped_mm(a, b)
    with ExportedOtherwise():
        assert torch.equal(F.grouped_mm(a, b), found)


class Loss(nn.Module):
    """The cross-entropy of classes or of logarithms, where the last class is ignored, or of shares of them."""

    def __init__(self, of: str, smoothing: float, reduction: str):
        super().__init__()
        weight, ignored = torch.rand(5), -100 if of == "shares" else 4
        self.cross_entropy = nn.CrossEntropyLoss(weight, None, ignored, None, reduction, smoothing)
        self.of_logarithms = nn.NLLLoss(weight, None, ignored, None, reduction)
        self.of = of

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.of == "logarithms":
            return self.of_logarithms(x.log_softmax(1), y.argmax(1))
        return self.cross_entropy(x, y.softmax(1) if self.of == "shares" else y.argmax(1))


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize(
    ("of", "smoothing", "reduction"),
    [(of, smoothing, "mean") for of in ("shares", "classes") for smoothing in (0.0, 0.3)]
    + [("shares", 0.3, "none"), ("classes", 0.3, "none"), ("logarithms", 0.0, "mean"), ("logarithms", 0.0, "none")],
)
def test_a_loss_keeps_its_smoothing_and_what_it_ignores(engine: str, of: str, smoothing: float, reduction: str) -> None:
    torch.manual_seed(0)
    model = Loss(of, smoothing, reduction).eval()
    executable = fxopt.lower(model, (torch.randn(6, 5), torch.randn(6, 5)), engine)
    given = torch.randn(9, 5), torch.randn(9, 5)
    assert relative_error(model(*given), executable(*given)) < 1e-5


class Confidence(nn.Module):
    """Logarithms of a sigmoid that is no float any more, and what torch computes by such."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.logsigmoid(x), F.binary_cross_entropy_with_logits(x, (x < 0).float(), reduction="none")


@pytest.mark.parametrize("engine", EXPORTING)
def test_logarithms_of_sigmoids_are_finite(engine: str) -> None:
    model, x = Confidence().eval(), torch.linspace(-300, 300, 64).reshape(4, 16)
    for found, expected in zip(fxopt.lower(model, x, engine)(x), model(x), strict=True):
        assert relative_error(expected, found) < 1e-5


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv3d(2, 4, 3, (1, 2, 2), (0, 1, 1), groups=2, bias=False), (2, 2, 3, 6, 5)),
        (nn.Conv3d(2, 1, (1, 3, 3), padding="same", padding_mode="replicate", bias=False), (2, 2, 3, 6, 5)),
        (nn.ConvTranspose3d(2, 3, 2, 2, bias=False), (2, 2, 3, 4, 5)),
        (nn.Conv1d(2, 3, 3, bias=False), (2, 2, 9)),
    ],
    ids=["of groups", "one channel", "transposed", "one axis"],
)
def test_a_convolution_of_other_than_two_axes_without_a_bias(
    engine: str, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    executable = fxopt.lower(layer.eval(), torch.randn(shape), engine)
    x = torch.randn(3, *shape[1:])
    with torch.no_grad():
        assert relative_error(layer(x), executable(x)) < 1e-5


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize(
    ("pools", "shape"),
    [
        ([nn.AdaptiveMaxPool1d(4), nn.AdaptiveMaxPool1d(3), nn.AdaptiveMaxPool1d(1)], (2, 3, 9)),
        ([nn.AdaptiveMaxPool2d(size) for size in (1, 2, (4, 3), (None, 5), (3, 4))], (2, 3, 9, 8)),
        ([nn.AdaptiveMaxPool3d(size) for size in (1, (2, 4, 3), (5, None, 4))], (2, 3, 5, 9, 8)),
        ([nn.AdaptiveAvgPool3d(size) for size in (1, (2, 4, 3), (5, None, 4))], (2, 3, 5, 9, 8)),
    ],
    ids=["one axis", "two axes", "three axes", "means"],
)
def test_adaptive_pooling_into_windows_of_any_size(engine: str, pools: list[nn.Module], shape: tuple[int, ...]) -> None:
    class Pyramid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([pool(x).flatten(1) for pool in pools], 1)

    executable = fxopt.lower(Pyramid().eval(), torch.randn(shape), engine)
    assert not executable.reasons, "the batch size is free"
    x = torch.randn(3, *shape[1:])
    assert relative_error(Pyramid()(x), executable(x)) < 1e-5


@pytest.mark.parametrize("engine", EXPORTING)
def test_means_over_a_divisor_or_with_pads_that_count(engine: str) -> None:
    pools = [
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d((3, 2), 2, (1, 0), ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=2),
        nn.AvgPool2d((2, 3), count_include_pad=False, divisor_override=5),
    ]

    class Pyramid(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([pool(x).flatten(1) for pool in pools], 1)

    executable = fxopt.lower(Pyramid().eval(), torch.randn(2, 3, 8, 9), engine)
    assert not executable.reasons, "the batch size is free"
    x = torch.randn(3, 3, 8, 9)
    assert relative_error(Pyramid()(x), executable(x)) < 1e-5


class Ray(nn.Module):
    """How much light of a ray is left at each place, and where light is sampled, as in a NeRF."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        left = torch.cumprod(1 - x.abs() / 4, -1)
        share = x.softmax(-1).cumsum(-1)
        places = torch.linspace(0.05, 0.95, 4).expand(*x.shape[:-1], 4)
        found = torch.searchsorted(share.contiguous(), places.contiguous(), right=True)
        first = torch.searchsorted(torch.tensor([-1.0, 0.0, 0.0, 1.0]), x.round(), side="left", out_int32=True)
        return left, (x > -1).cumprod(dim=1), (x > 0).cumprod(-2, dtype=torch.float32), found, first


@pytest.mark.parametrize("engine", EXPORTING)
def test_cumulated_products_and_places_in_a_sorted_sequence(engine: str) -> None:
    model, x = Ray().eval(), torch.randn(2, 3, 11)
    executable = fxopt.lower(model, x, engine)
    assert not executable.reasons, "the number of rays is free"
    fresh = torch.randn(5, 3, 11)
    for found, expected in zip(executable(fresh), model(fresh), strict=True):
        assert found.dtype is expected.dtype
        assert relative_error(expected, found) < 1e-5


class AssignsToSlices(nn.Module):
    """Writes into slices, some of which hold nothing, as the mask of a window that is not shifted does."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x.new_zeros(4, 6)
        for number, rows in enumerate((slice(0, -3), slice(-3, 0), slice(0, None))):
            mask[rows, 1:3] = number + 1
        written = x.clone()
        written[:, :, 2:2] = 5.0
        written[:, 1:3] = 7.0
        return written + mask, x[:, 0:0].clone()


@pytest.mark.parametrize("engine", EXPORTING)
def test_assignments_to_empty_slices_change_nothing(engine: str) -> None:
    model = AssignsToSlices().eval()
    executable = fxopt.lower(model, torch.randn(2, 4, 6), engine)
    fresh = torch.randn(3, 4, 6)
    for found, expected in zip(executable(fresh), model(fresh), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("engine", EXPORTING)
def test_a_convolution_of_three_axes_without_a_bias_has_its_options_by_name(engine: str) -> None:
    torch.manual_seed(0)

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv3d(x, self.weight, stride=2, padding=1)

    model, x = Strided().eval(), torch.randn(2, 3, 6, 6, 6)
    with torch.no_grad():
        assert relative_error(model(x), fxopt.lower(model, x, engine)(x)) < 1e-5
