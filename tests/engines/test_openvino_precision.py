"""OpenVINO in bfloat16: what stays in float32, and how weights are rounded."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.engines import Executable, climb
from fxopt.engines.openvino import OpenVINO, mixed, precision, rounding
from fxopt.engines.openvino.model import Model, shapes_of
from fxopt.engines.openvino.session import Session
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.relative_error import relative_error
from tests.engines.test_others import needs


@pytest.fixture(autouse=True)
def openvino_is_there() -> None:
    needs("openvino")


@pytest.fixture
def rounds() -> None:
    """bfloat16 is what it says on this CPU."""
    torch.manual_seed(0)
    error = fxopt.lower(nn.Linear(64, 64).eval(), torch.randn(4, 64), "openvino", precision="bf16").relative_error
    if error < 1e-4:  # type: ignore[operator]
        pytest.skip("OpenVINO has no kernels for bfloat16 on this CPU")


def marks(executable: Executable, path: Path) -> Mapping[str, list[bool]]:
    """By the kind of operator, whether each is kept in float32."""
    executable.save(path)
    found: dict[str, list[bool]] = defaultdict(list)
    for layer in ElementTree.parse(path / "model.xml").iter("layer"):
        mark = layer.find("rt_info/attribute[@name='DisablePrecisionConversion']")
        found[str(layer.get("type"))].append(mark is not None)
    return found


class Residual(nn.Module):
    """What each layer adds is small beside what is handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(self.norm(x)))
        return torch.as_tensor(self.head(x))


def test_mixed_precision_is_closer_than_bfloat16(rounds: None) -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 16, 64)
    errors = {
        each: fxopt.lower(model, x, "openvino", precision=each).relative_error for each in ("f32", "bf16", "mixed")
    }
    assert errors["f32"] < errors["mixed"] < 0.5 * errors["bf16"]  # type: ignore[operator]


class Patches(nn.Module):
    """A transformer of images without its attention."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x


def test_mixed_precision_keeps_sums_and_normalisations_and_what_they_are_handed(tmp_path: Path) -> None:
    kept = marks(fxopt.lower(Patches().eval(), torch.randn(2, 3, 32, 32), "openvino", precision="mixed"), tmp_path)
    assert kept["MVN"] == [True] * 3
    assert kept["Add"].count(False) == 3, "the bias of each layer that no sum reads"
    assert all(kept["Concat"]), "it moves what the first sum reads"
    assert not any(kept["MatMul"] + kept["Convolution"] + kept["ReLU"])
    assert sorted(kept["Clamp"]) == [False] * 3 + [True] * 3, "behind each normalisation, and each layer a sum reads"


def test_a_normalisation_that_is_an_output_is_not_rounded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    kept = marks(fxopt.lower(model, torch.randn(2, 8), "openvino", precision="mixed"), tmp_path)
    assert kept["Clamp"] == [True], "the layer writes what the normalisation reads; nothing comes behind that"


def running(executable: Executable, x: Tensor) -> list[tuple[str, str, str]]:
    """The operators that OpenVINO runs: their kind, what they write, and in which layout."""
    models: list[Model] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Model, "__call__", lambda self, tensors: models.append(self) or self.session(shapes_of(tensors))(tensors)
        )
        executable(x)
    operators = models[0].session(shapes_of([x])).compiled.get_runtime_model().get_ordered_ops()
    keys = ("layerType", "outputPrecisions", "outputLayouts")
    facts = [operator.get_rt_info() for operator in operators]
    return [tuple(each[key].astype(str) for key in keys) for each in facts]  # type: ignore[misc]


def test_nothing_is_copied_between_a_sum_in_float32_and_its_neighbours(rounds: None) -> None:
    x = torch.randn(2, 3, 32, 32)
    mixed_precision = fxopt.lower(Patches().eval(), x, "openvino", precision="mixed", pieces=False)
    found = running(mixed_precision, x)
    layers = [operator for operator in found if operator[0] == "FullyConnected"]
    assert [precision for _, precision, _ in layers] == ["bf16", "f32"] * 3, (
        "what a sum reads is written as it reads it"
    )
    assert [precision for kind, precision, _ in found if kind == "MVN"] == ["bf16"] * 3, "what a layer reads as well"
    activations = [operator for operator in found if operator[0] == "Reorder" and len(operator[2]) == 3]
    assert len(activations) <= 2, "what the convolution writes, once; no later one"
    assert not any(layout == "acb" for *_, layout in found), "no sum is transposed"


def test_a_scaled_normalisation_stays_in_float32_to_its_end(tmp_path: Path, rounds: None) -> None:
    torch.manual_seed(0)
    model, x = Patches().eval(), torch.randn(2, 3, 32, 32)
    for norm in model.norms:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    executable = fxopt.lower(model, x, "openvino", precision="mixed", pieces=False)
    assert marks(executable, tmp_path)["Multiply"] == [True] * 3
    assert not any(layout == "acb" for *_, layout in running(executable, x)), "nothing is transposed on the way"


class Attention(nn.Module):
    """By hand, with a mask that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) + mask
        return torch.as_tensor(x + scores.softmax(-1) @ self.value(x))


def test_a_sum_inside_attention_is_rounded(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 16, 64), torch.zeros(2, 16, 16))
    kept = marks(fxopt.lower(Attention().eval(), inputs, "openvino", precision="mixed"), tmp_path)
    assert kept["Add"].count(True) == 1
    assert not any(kept["MatMul"] + kept["Softmax"] + kept["Clamp"])


class Resizes(nn.Module):
    """To a size, and by a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        up = nn.functional.interpolate(self.conv(x), size=(24, 24), mode="bilinear")
        return nn.functional.interpolate(up, scale_factor=2.0, mode="nearest")


def test_mixed_precision_keeps_resizes(tmp_path: Path, rounds: None) -> None:
    torch.manual_seed(0)
    model, x = Resizes().eval(), torch.randn(2, 3, 16, 16)
    kept = marks(fxopt.lower(model, x, "openvino", precision="mixed"), tmp_path)
    assert (kept["Interpolate"], kept["Convolution"]) == ([True, True], [False])
    example = Inputs((x,), {})
    executable = Executable(OpenVINO(precision="mixed"), fxopt.capture(model, (x,)).module, example)
    executable._choices = {"float32": 1.0, "rows": 0}
    assert relative_error(model(x), executable(x)) < 1e-5, "the convolution is kept, and so are the resizes"
    with torch.no_grad():
        y = torch.randn(3, 3, 16, 16)
        assert relative_error(model(y), executable(y)) < 1e-5, "at another batch size too"


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(8, 4, 3), (8, 12, 12)),
    "conv without a bias": (lambda: nn.Conv2d(8, 4, 3, bias=False), (8, 12, 12)),
    "grouped": (lambda: nn.Conv2d(32, 4, 3, groups=2), (32, 12, 12)),
    "conv of one dimension": (lambda: nn.Conv1d(16, 4, 3), (16, 20)),
    "linear": (lambda: nn.Linear(64, 4), (64,)),
    "linear on sequences": (lambda: nn.Linear(64, 4, bias=False), (6, 64)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rounded_weights_move_the_mean_of_no_channel(kind: str, monkeypatch: pytest.MonkeyPatch, rounds: None) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer, x, others = build().eval(), torch.rand(64, *shape), torch.rand(256, *shape)
    careful = fxopt.lower(layer, x, "openvino", precision="bf16", pieces=False)
    monkeypatch.setattr(precision, "put_weights", lambda *given: None)
    nearest = fxopt.lower(layer, x, "openvino", precision="bf16", pieces=False)

    def moved(executable: Executable) -> float:
        """The mean error of a channel, the largest of them."""
        with torch.no_grad():
            error = executable(others) - layer(others)
        return float(error.transpose(0, -1 if "linear" in kind else 1).flatten(1).mean(1).abs().max())

    assert moved(careful) < 0.4 * moved(nearest)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 9]), st.floats(-3, 3))
def test_a_weight_goes_to_one_of_its_two_neighbours_and_no_mean_gets_farther_away(
    seed: int, outputs: int, inputs: int, taps: int, mean: float
) -> None:
    torch.manual_seed(seed)
    weight, means = torch.randn(outputs, inputs, taps), torch.randn(1, inputs, 1).expand(outputs, -1, -1) + mean
    lost = 1e-3 * torch.randn(outputs)
    rounded = rounding._rounded(weight, means, lost)
    assert rounded.dtype is torch.bfloat16
    found, nearest = rounded.float(), weight.bfloat16().float()
    assert ((found - weight).abs() < 2**-7 * weight.abs()).all()

    def left(rounded: Tensor) -> Tensor:
        return (lost + ((weight - rounded) * means).sum((1, 2))).abs()

    assert (left(found) <= left(nearest) + 1e-6).all()


def test_exact_weights_stay() -> None:
    weight = torch.randn(3, 5, 2).bfloat16().float()
    assert torch.equal(rounding._rounded(weight, torch.ones(3, 5, 1), torch.zeros(3)), weight)


def test_weights_stay_where_nothing_is_computed_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    given: list[Mapping[str, Tensor]] = []
    monkeypatch.setattr(precision, "_computed_in_bfloat16", lambda compiled, layers: set())
    monkeypatch.setattr(precision, "put_weights", lambda read, weights: given.append(weights))
    fxopt.lower(Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="bf16")
    assert given == [{}]


class Rectified(nn.Module):
    """Layers that are each given what is positive."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3), nn.ReLU()]
        for _ in range(8):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(64, 64, 3, groups=4, padding=1, bias=False), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Conv2d(64, 64, 2)]
        self.body = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x))


def test_mixed_precision_keeps_as_many_layers_as_the_bound_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Rectified().eval(), torch.randn(4, 3, 8, 8)
    errors = iter([8e-2, 7e-2, 6e-2, 4e-2, 9e-2])
    monkeypatch.setattr(precision._Rounding, "error", lambda self, model: next(errors))
    rounded: list[object] = []
    round_all = precision.rounded_weights
    monkeypatch.setattr(precision, "rounded_weights", lambda *given: rounded.append(given) or round_all(*given))
    executable = fxopt.lower(model, x, "openvino", precision="mixed", max_error=5e-2)
    assert executable.choices["float32"] == 0.2
    assert next(errors) == 9e-2, "no more was tried"
    assert len(rounded) == 1, "weights are rounded once for all shares"
    expected = executable(x)
    again = pickle.loads(pickle.dumps(executable))
    assert torch.equal(again(x), expected), "which was not searched for again"


def test_more_layers_in_float32_are_closer(tmp_path: Path, rounds: None) -> None:
    torch.manual_seed(0)
    model, x = Rectified().eval(), torch.randn(4, 3, 8, 8)
    example = Inputs((x,), {})
    counts, errors = [], []
    for share in (0.0, 0.4, 1.0):
        executable = Executable(OpenVINO(precision="mixed"), fxopt.capture(model, (x,)).module, example)
        executable._choices = {"float32": share, "rows": 0}
        kept = marks(executable, tmp_path)
        counts.append(sum(kept["Convolution"] + kept["GroupConvolution"]))
        with torch.no_grad():
            errors.append(float((model(x) - executable(x)).square().mean().sqrt()))
    assert counts == [0, 7, 18]
    assert errors[2] < 1e-5 < errors[1] < errors[0]


def refuse_to_compile(below: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OpenVINO compile no smaller share of layers in float32, as it does at some parts of residual blocks."""
    keep, session, shares = precision._Rounding.keep, Model.session, [1.0]

    def remembered(self: precision._Rounding, model: Model, share: float) -> None:
        shares.append(share)
        keep(self, model, share)

    def refused(self: Model, shapes: tuple[torch.Size, ...]) -> Session:
        if shares[-1] < below:
            raise RuntimeError("object is not initialized")
        return session(self, shapes)

    monkeypatch.setattr(precision._Rounding, "keep", remembered)
    monkeypatch.setattr(Model, "session", refused)


def test_a_share_that_openvino_cannot_compile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_compile(0.2, monkeypatch)
    executable = fxopt.lower(
        Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="mixed", max_error=0.5, pieces=False
    )
    assert executable.choices["float32"] == 0.2


def test_a_model_that_openvino_compiles_in_no_mixed_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_compile(1.0, monkeypatch)
    with pytest.raises(EngineError, match="compiles this model in no mixed precision; give precision=f32 or bf16"):
        fxopt.lower(Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="mixed", max_error=0.5)


def test_the_closest_share_is_taken_where_none_leaves_a_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([8e-2, 7e-2, 4.8e-2, 6e-2, 7e-2, 6e-2, 6e-2])
    monkeypatch.setattr(precision._Rounding, "error", lambda self, model: next(errors))
    executable = fxopt.lower(Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="mixed", max_error=5e-2)
    assert executable.choices["float32"] == 0.1


def test_a_bound_may_take_three_quarters_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision._Rounding, "error", lambda self, model: next(errors))
    errors = iter([9e-2, 8e-2, 8e-2, 7e-2, 7e-2, 6e-2, 4.8e-2])
    executable = fxopt.lower(Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="mixed", max_error=5e-2)
    assert executable.choices["float32"] == 0.75


def test_a_bound_that_takes_too_many_layers_is_refused(rounds: None) -> None:
    torch.manual_seed(0)
    with pytest.raises(
        EngineError, match=r"with \d+ % of the layers in float32 its outputs differ by .* \(allowed 0\.0001\)"
    ):
        fxopt.lower(Rectified().eval(), torch.randn(4, 3, 8, 8), "openvino", precision="mixed", max_error=1e-4)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "mixed", "max_error": 1e-2}])
def test_a_model_without_weights_is_taken(options: dict[str, object]) -> None:
    x = torch.randn(4, 5)
    assert torch.equal(fxopt.lower(nn.ReLU().eval(), x, "openvino", **options)(x), x.relu())


@pytest.mark.parametrize(
    "options", [{"max_error": 1e-2}, *({"precision": "mixed", "max_error": bad} for bad in (0.0, float("nan")))]
)
def test_a_bound_is_positive_and_for_mixed_precision_alone(options: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="max_error is a positive number, and for precision=mixed alone"):
        fxopt.lower(nn.Linear(3, 2).eval(), torch.randn(2, 3), "openvino", **options)


@pytest.mark.parametrize(
    ("asked", "told", "bound"),
    [
        ("openvino{precision=mixed}", 1e-2, 1e-2),
        ("openvino{precision=mixed,max_error=0.02}", 1e-2, 2e-2),
        ("openvino{precision=mixed,max_error=0.02}", None, 2e-2),
        ("openvino{precision=bf16}", 1e-2, None),
    ],
)
def test_a_ladder_tells_mixed_precision_its_bound(asked: str, told: float | None, bound: float | None) -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    inputs = Inputs((x,), {})
    found = climb(asked, model, fxopt.capture(model, (x,)).module, inputs, max_error=told, budget_seconds=2.0)
    assert found.chosen is not None and found.chosen.executable is not None
    engine = found.chosen.executable.engine
    assert isinstance(engine, OpenVINO) and engine.max_error == bound
    assert found.chosen.label == asked


def test_an_openvino_that_cannot_keep_operators_in_float32_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "_MARKED", mixed._MARKED.replace(mixed._ATTRIBUTE, "NeverHeardOf"))
    with pytest.raises(EngineError, match="this version can't keep operators in float32; upgrade it"):
        fxopt.lower(nn.Linear(3, 2).eval(), torch.randn(2, 3), "openvino", precision="mixed")


def test_float32_in_place_of_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.engines.openvino._has_bfloat16", lambda: False)
    executable = fxopt.lower(nn.Linear(4, 4).eval(), torch.randn(2, 4), "openvino", precision="bf16")
    assert [skip.reason for skip in executable.reasons] == [
        "OpenVINO has no kernels for bfloat16 on this CPU, and computes in float32 instead"
    ]
