"""Where masks go, what they hold at zero, and what is left once they are baked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger
from fxopt.pipeline import run_passes
from fxopt.spec import parse
from passes import Sparsify, sparsify
from passes.sparsify.pattern import Pattern, unview, view


class Functional(nn.Module):
    """Weights that functions use, one of them twice, and inputs by outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.randn(16, 8))
        self.product = nn.Parameter(torch.randn(16, 8))
        self.kernel = nn.Parameter(torch.randn(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.linear(x, self.linear)) @ self.product
        return F.linear(F.conv1d(x.unsqueeze(2), self.kernel, groups=2).squeeze(2), self.linear)


class Last(nn.Module):
    """Channels behind the places, in the same memory: torch chooses a kernel by whether the weight trains."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.recurrent = kind(8, 12, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.recurrent(self.embedding(ids))[0]


class Opaque(nn.Module):
    """A loop over the value of an input: its layers stay in the user's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        while float(x.abs().sum().item()) > 1e9:
            x = x / 2
        return self.outer(self._steps(x))

    def _steps(self, x: Tensor) -> Tensor:
        for _ in range(int(x.shape[0])):
            if bool(x.sum() < 0):
                x = torch.tanh(self.inner(x))
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def ids() -> Tensor:
    return torch.randint(0, 12, (2, 5))


def rows() -> Tensor:
    return torch.randn(3, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), rows, {"0", "1"}),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(4, 4, 1)),
        lambda: torch.randn(2, 4, 6, 6),
        {"0", "1", "2"},
    ),
    "channels last": (lambda: nn.Sequential(Last(), nn.Linear(32, 1)), lambda: torch.randn(2, 32, 3, 5), {"1"}),
    "functional": (Functional, rows, {"linear", "product", "kernel"}),
    "lstm": (
        lambda: Recurrent(nn.LSTM),
        ids,
        {"embedding", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"},
    ),
    "gru": (lambda: Recurrent(nn.GRU), ids, {"embedding", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}),
    "opaque": (Opaque, rows, {"inner", "outer"}),
    "tied": (Tied, ids, {"embedding"}),
    "attention": (
        Attention,
        lambda: torch.randn(2, 3, 8),
        {"layer.self_attn.in_proj_weight", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2"},
    ),
}


def run(
    model: nn.Module, inputs: Any, spec: str = "sparsify{amount=0.75}", data: Sequence[Any] = ()
) -> tuple[GraphModule, Ledger]:
    """What `fxopt.optimize` does, without holding the passes to their promise."""
    captured = capture(model, inputs)
    ledger = run_passes(captured, parse(spec), calibration=[Inputs.of(batch) for batch in data])
    return captured.module, ledger


def masked(*arguments: Any) -> GraphModule:
    return run(*arguments)[0]


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    factory, inputs, _ = MODELS[name]
    return factory().eval(), inputs()


@pytest.mark.parametrize("name", MODELS)
def test_masks_weights_of_every_kind(name: str) -> None:
    model, x = build(name)
    expected, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    module = masked(model, (x,))
    found = sparsify.masked_weights(module)
    assert {each.name for each in found} == MODELS[name][2]
    for each in found:
        assert not each.weight[~each.mask.mask].any()
        assert each.mask.sparsity == pytest.approx(0.75)
        expected.get_parameter(slot(model, each.name)).data.mul_(each.mask.mask)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected(x))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items()), "the original stays"


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_masks_whatever_the_weight_is(name: str) -> None:
    model, x = build(name)
    module = masked(model, (x,)).train()
    found = sparsify.masked_weights(module)
    before = module(x)
    with torch.no_grad():
        for each in found:
            each.weight.add_(~each.mask.mask)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)
    module(x).square().sum().backward()
    for each in found:
        gradient = each.weight.grad
        assert gradient is not None or name == "opaque"
        assert gradient is None or not gradient[~each.mask.mask].any()


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_bakes(name: str) -> None:
    model, x = build(name)
    module = masked(model, (x,))
    with torch.no_grad():
        before = module(x)
        for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(duplicate(x), before)
            assert len(sparsify.masked_weights(duplicate)) == len(sparsify.masked_weights(module))
        sparsify.bake(module)
        assert torch.equal(module(x), before)
        model.load_state_dict(module.state_dict())
        assert torch.equal(model(x), before)
    kinds = [type(child) for child in module.modules() if not isinstance(child, GraphModule)]
    assert name == "opaque" or kinds == [type(child) for child in model.modules()][1:]


def test_a_mask_loads_with_the_weights() -> None:
    model, x = build("linear")
    module, other = masked(model, (x,)), masked(model, (x,), "sparsify{amount=0.5,criterion=random}")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


GRANULARITIES = ("element", "2:4", "1:4", "block4x1", "block2x4", "row", "column")
SHAPES = {"linear": ((8, 16), 0), "conv": ((8, 4, 3, 3), 0), "transposed": ((8, 4, 2), 1), "product": ((16, 8), 1)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_largest_units_stay(granularity: str, shape: str) -> None:
    torch.manual_seed(0)
    size, outputs = SHAPES[shape]
    weight = torch.randn(size)
    layers = {
        "linear": lambda: nn.Linear(16, 8),
        "conv": lambda: nn.Conv2d(4, 8, 3),
        "transposed": lambda: nn.ConvTranspose1d(8, 4, 2),
        "product": lambda: Product(),
    }
    layer = layers[shape]()
    layer.weight.data.copy_(weight)
    example = {"linear": (2, 16), "conv": (1, 4, 5, 5), "transposed": (1, 8, 5), "product": (2, 16)}[shape]
    amount = "" if ":" in granularity else "amount=0.5,"
    module = masked(layer.eval(), (torch.randn(example),), f"sparsify{{{amount}granularity={granularity}}}")
    (found,) = sparsify.masked_weights(module)
    kept, size_of = view(found.mask.mask, outputs), view(weight.abs(), outputs)
    assert torch.equal(unview(kept, weight.shape, outputs), found.mask.mask)
    pattern = Pattern.parse(granularity)
    if pattern.kind == "n:m":
        groups, values = kept.reshape(-1, 4), size_of.reshape(-1, 4)
        assert (groups.sum(1) == pattern.first).all()
        least, most = values.masked_fill(~groups, torch.inf).amin(1), values.masked_fill(groups, 0).amax(1)
        assert (least >= most).all()
        return
    units, scores = pattern.unit_scores(kept.float()), pattern.unit_scores(size_of)
    assert ((units == 0) | (units == 1)).all(), "a unit goes as one"
    assert int(units.sum()) == round(len(units) / 2)
    assert scores[units == 1].min() >= scores[units == 0].max()


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_global_scope_compares_layers_and_leaves_none_empty() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    module = masked(model, (torch.randn(2, 10),), "sparsify{amount=0.6,scope=global}")
    first, second = sparsify.masked_weights(module)
    assert first.mask.sparsity + second.mask.sparsity == pytest.approx(1.2, abs=0.011)
    assert second.mask.sparsity == pytest.approx(0.99)


def test_random_is_the_same_each_time() -> None:
    model, x = build("linear")
    spec = "sparsify{criterion=random,seed=3}"
    masks = [[each.mask.mask for each in sparsify.masked_weights(masked(model, (x,), spec))] for _ in range(2)]
    assert all(torch.equal(left, right) for left, right in zip(*masks, strict=True))
    other = sparsify.masked_weights(masked(model, (x,), "sparsify{criterion=random,seed=4}"))
    assert not torch.equal(masks[0][0], other[0].mask.mask)


@pytest.mark.parametrize("name", ["linear", "conv", "functional"])
def test_wanda_weighs_by_what_inputs_saw(name: str) -> None:
    model, x = build(name)
    data = [(x,), (x * 2,)]
    module = masked(model, (x,), "sparsify{amount=0.5,criterion=wanda}", data)
    first = sparsify.masked_weights(module)[0]
    weight = model.get_parameter(slot(model, first.name))
    if name == "conv":
        squares = 5 * x.square().sum((0, 2, 3)).reshape(2, 1, 2, 1, 1)
        scores = (weight.abs().reshape(2, 4, 2, 3, 3) * squares.sqrt()).reshape(weight.shape)
    elif name == "linear":
        scores = weight.abs() * (5 * x.square().sum(0)).sqrt()
    else:
        seen = torch.zeros(8)
        for (each,) in data:  # the weight is used twice
            inner = torch.relu(F.linear(each, model.linear)) @ model.product
            seen += each.square().sum(0) + F.conv1d(inner.unsqueeze(2), model.kernel, groups=2).square().sum((0, 2))
        scores = weight.abs() * seen.sqrt()
    kept = view(first.mask.mask, 0).flatten(1)
    scores = view(scores.detach(), 0).flatten(1)
    assert (kept.sum(1) == kept.shape[1] // 2).all(), "each output keeps the same share"
    assert (scores.masked_fill(~kept, torch.inf).amin(1) >= scores.masked_fill(kept, 0).amax(1)).all()


def test_wanda_sees_inputs_that_are_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    x = torch.randn(2, 8)
    (found,) = sparsify.masked_weights(masked(Named(), (x,), "sparsify{criterion=wanda}", [(x,)]))
    assert found.mask.input_norm is not None
    assert torch.equal(found.mask.input_norm[0, 0], x.square().sum(0).sqrt())


@pytest.mark.parametrize("form", ["module", "function"])
def test_wanda_goes_by_magnitude_behind_a_gate_of_zeros(form: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(8))
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.layer = nn.Linear(8, 4) if form == "module" else None

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x * self.gate, self.weight) if self.layer is None else self.layer(x * self.gate)

    model, x = Gated(), torch.randn(2, 8)
    (found,) = sparsify.masked_weights(masked(model, (x,), "sparsify{criterion=wanda,amount=0.5}", [(x,)]))
    sizes = (model.weight if model.layer is None else model.layer.weight).detach().abs()
    assert torch.equal(found.mask.mask, sizes >= sizes.topk(4).values.amin(1, keepdim=True))


def test_bn_scale_removes_the_rows_of_small_scales() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(8.0))
    spec = "sparsify{amount=0.5,granularity=row,criterion=bn-scale}"
    module, ledger = run(model, (torch.randn(1, 3, 6, 6),), spec)
    (found,) = sparsify.masked_weights(module)
    assert found.mask.mask.flatten(1).any(1).tolist() == [False] * 4 + [True] * 4
    (skip,) = ledger.entries[0].skips
    assert skip.reason == "'output' reads its output, no batch norm: bn-scale has nothing to go by"


REFUSED = {
    "amount=1.0": "'amount' is a share between 0 and 1",
    "amount=0.7,granularity=2:4": "'2:4' removes 0.5 of the weights, amount=0.7 asks for another share",
    "granularity=4:2": "expected n:m with 0 < n < m",
    "granularity=block0x4": "'granularity' is element",
    "granularity=2:4,scope=global": "leave out scope=global",
    "criterion=bn-scale": "needs granularity=row",
    "criterion=movement": "take schedule=cubic or linear",
    "criterion=gradient": "'criterion' of pass 'sparsify' is magnitude|random",
    "schedule=cubic,steps=0": "'steps' is a whole number from 1",
    "targets=['']": "would match nothing",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_make_no_sense_are_refused(options: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(f"sparsify{{{options}}}")
    assert REFUSED[options] in str(error.value)


def test_targets_that_no_layer_has_are_an_error() -> None:
    model, x = build("linear")
    with pytest.raises(PassError, match=r"no weight is called '\*\.attn'; there are '0', '1'"):
        masked(model, (x,), "sparsify{targets=[*.attn]}")


def test_wanda_without_data_is_an_error() -> None:
    model, x = build("linear")
    with pytest.raises(PassError, match="needs the inputs of the layers"):
        masked(model, (x,), "sparsify{criterion=wanda}")


class Experts(nn.Module):
    """The sum of the input decides which of two experts runs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.experts[int(x.sum().item() > 0)](x)
        return out


def test_wanda_goes_by_magnitude_where_no_batch_came_and_says_so() -> None:
    model, x = Experts(), torch.rand(4, 8)
    result = fxopt.optimize(model, x, "sparsify{criterion=wanda,amount=0.5}", devices=(), calibration_data=[x])
    left = result.module.get_parameter("experts.0.weight").ne(0)
    largest = model.experts[0].weight.abs().topk(4, 1).indices
    assert torch.equal(left, torch.zeros_like(left).scatter_(1, largest, True))
    said = [change.where for change in result.ledger.changes if "no calibration batch" in change.what]
    assert said == ["experts.0"]


def test_data_that_the_model_does_not_take_is_named() -> None:
    model, x = build("linear")
    with pytest.raises(PassError, match="sparsify: the module does not take batch 2"):
        masked(model, (x,), "sparsify{criterion=wanda}", [Inputs((x,)), Inputs((x[..., :-1],))])


def test_targets_and_exclude_choose_layers() -> None:
    model, x = build("functional")
    module = masked(model, (x,), "sparsify{targets=[lin*,prod*],exclude=[product]}")
    assert [each.name for each in sparsify.masked_weights(module)] == ["linear"]


def first_skip(model: nn.Module, x: Tensor, spec: str) -> str:
    return run(model, (x,), spec)[1].entries[0].skips[0].reason


SKIPPED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "it has 10 inputs a group: 2:4 needs a multiple of 4": (
        lambda: nn.Linear(10, 8),
        torch.randn(2, 10),
        "sparsify{granularity=2:4}",
    ),
    "it is 6x8: block4x1 needs multiples of 4 and 1": (
        lambda: nn.Linear(8, 6),
        torch.randn(2, 8),
        "sparsify{granularity=block4x1}",
    ),
    "it has a single row, which has to stay": (
        lambda: nn.Linear(8, 1),
        torch.randn(2, 8),
        "sparsify{granularity=row}",
    ),
    "its 'max_norm' rewrites the weight at each call": (
        lambda: nn.Embedding(8, 4, max_norm=1.0),
        torch.tensor([1, 2]),
        "sparsify",
    ),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_cannot_be_masked_says_why(reason: str) -> None:
    factory, x, spec = SKIPPED[reason]
    assert first_skip(nn.Sequential(factory()).eval(), x, spec) == reason


class OwnLinear(nn.Linear):
    """Its forward is its own, so that the graph shows the function in it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(), self.bias)


def test_a_class_of_its_own_is_skipped_only_where_no_function_takes_the_weight() -> None:
    model = nn.Sequential(OwnLinear(8, 8), Standardised(8, 8)).eval()
    module, ledger = run(model, (torch.randn(2, 8),), "sparsify")
    assert [each.name for each in sparsify.masked_weights(module)] == ["0"]
    assert [(skip.where, skip.reason) for skip in ledger.entries[0].skips] == [
        ("1", "its class 'Standardised' overrides 'forward' of Linear")
    ]


def test_the_ledger_has_the_sparsity_of_each_layer_and_in_all() -> None:
    model, x = build("linear")
    entry = fxopt.optimize(model, (x,), "sparsify{amount=0.5}", devices=()).ledger.entries[0]
    said = {(change.where, change.what) for change in entry.changes}
    assert {("0", "50.0% zeros"), ("1", "50.0% zeros")} <= said
    assert ("in all", "48 zeros: 50.0% of the masked weights, 44.4% of all parameters") in said


@pytest.mark.parametrize("model", [nn.Linear(8, 4), nn.ReLU()])
def test_global_scope_takes_a_model_without_anything_new_to_mask(model: nn.Module) -> None:
    module = masked(model, (torch.randn(2, 8),), "sparsify{scope=global}")
    _, ledger = run(module, (torch.randn(2, 8),), "sparsify{scope=global}")
    assert not ledger.changes


def test_a_second_run_leaves_masks_alone() -> None:
    model, x = build("linear")
    module = masked(model, (x,), "sparsify{amount=0.5},sparsify{amount=0.9}")
    assert [each.mask.sparsity for each in sparsify.masked_weights(module)] == [0.5, 0.5]


def test_baking_waits_for_evaluation() -> None:
    model, x = build("linear")
    entries = run(model.train(), (x,), "sparsify,sparsify-bake")[1].entries
    assert "call eval() first" in entries[1].skips[0].reason
    with pytest.raises(PassError, match="has no masks"):
        sparsify.bake(model)


def test_options_round_trip() -> None:
    (made,) = parse("sparsify{amount=0.5,granularity=2:4,targets=[a,b]}")
    assert made == Sparsify(amount=0.5, granularity="2:4", targets=("a", "b"))


def slot(model: nn.Module, name: str) -> str:
    return name if name in dict(model.named_parameters(remove_duplicate=False)) else f"{name}.weight"
