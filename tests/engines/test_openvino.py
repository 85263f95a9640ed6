"""OpenVINO: a batch in pieces where rows are independent, what mixed precision rounds, and what runs on integers."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.engines import Executable
from fxopt.engines.openvino import mixed
from fxopt.engines.openvino import rows as choosing
from fxopt.engines.openvino.session import Pieces
from fxopt.errors import EngineError
from passes import PTQ, QuantizeFreeze
from tests.engines.test_others import needs


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    needs("openvino")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pieces_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two rows are the fastest, where they are tried."""
    monkeypatch.setattr(choosing, "shortest", lambda calls, seconds: {name: 2.0 - (name == "2") for name in calls})


class Calls(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, scale: Tensor) -> object:
        return self.function(x, scale)


def lowered(function: Callable[..., object], **options: object) -> tuple[Executable, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs = torch.randn(8, 5), torch.tensor(3.0)
    return fxopt.lower(Calls(function).eval(), inputs, "openvino", **options), inputs


def alone(x: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {"softmax": (x * scale).softmax(1), "largest": x.argmax(1), "rows": x.unsqueeze(1).expand(-1, 3, -1) * scale}


@pytest.mark.usefixtures("pieces_are_faster")
@pytest.mark.parametrize("batch", [8, 16, 4, 2, 1, 3, 7])
def test_pieces_give_what_the_batch_gives(batch: int) -> None:
    executable, _ = lowered(alone)
    assert executable.choices == {"rows": 2}
    inputs = torch.randn(batch, 5), torch.tensor(-2.0)
    torch.testing.assert_close(executable(*inputs), alone(*inputs))


@pytest.mark.usefixtures("pieces_are_faster")
def test_outputs_of_one_call_are_not_those_of_the_next() -> None:
    executable, (x, scale) = lowered(alone)
    first = executable(x, scale)
    executable(-x, scale)
    torch.testing.assert_close(first, alone(x, scale))


COUPLED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "the mean of all rows": lambda x, scale: x - x.mean(0),
    "sums over the rows before": lambda x, scale: x.cumsum(0),
    "sums over the rows after": lambda x, scale: x.flip(0).cumsum(0).flip(0),
    "the row before": lambda x, scale: x + x.roll(1, 0),
    "each pair of rows": lambda x, scale: x @ x.T,
    "a number for all": lambda x, scale: (x * scale).sum(),
    "one output for all, one by row": lambda x, scale: (x * scale, x.mean()),
    "the number of its row": lambda x, scale: x + torch.arange(x.shape[0]).unsqueeze(1),
    "the number of rows": lambda x, scale: x / x.shape[0],
    "a largest value, far above what it changes": lambda x, scale: x + 1e-6 * x.max(),
}


@pytest.mark.usefixtures("pieces_are_faster")
@pytest.mark.parametrize("function", COUPLED.values(), ids=COUPLED)
def test_rows_that_know_of_each_other_stay_together(function: Callable[[Tensor, Tensor], object]) -> None:
    executable, inputs = lowered(function)
    assert executable.choices == {"rows": 0}
    torch.testing.assert_close(executable(*inputs), function(*inputs))


def test_a_batch_stays_whole_where_pieces_are_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "shortest", lambda calls, seconds: {name: 1.0 - 0.005 * int(name) for name in calls})
    assert lowered(alone)[0].choices == {"rows": 0}


@pytest.mark.usefixtures("pieces_are_faster")
def test_nothing_is_taken_apart_unasked() -> None:
    assert lowered(alone, pieces=False)[0].choices == {"rows": 0}


@pytest.mark.usefixtures("pieces_are_faster")
def test_a_copy_keeps_the_choice_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    executable, inputs = lowered(alone)
    monkeypatch.delattr(choosing, "shortest")
    again = pickle.loads(pickle.dumps(executable))
    torch.testing.assert_close(again(*inputs), executable(*inputs))
    assert again.choices == {"rows": 2}


class Request:
    """Gives what it is given, once it is waited for; `fails` is what that raises for as long as it is set."""

    def __init__(self) -> None:
        self.fails = ""
        self.runs = False

    def set_input_tensor(self, index: int, tensor: Any) -> None:
        assert not self.runs
        self.given = tensor.data.copy()

    def start_async(self) -> None:
        self.runs = True

    def wait(self) -> None:
        self.runs = False
        if self.fails:
            raise RuntimeError(self.fails)

    def get_output_tensor(self, index: int) -> Any:
        return SimpleNamespace(data=self.given)


@pytest.mark.parametrize("failing", range(4))
def test_a_piece_that_fails_leaves_none_running_and_the_next_call_whole(failing: int) -> None:
    requests: list[Request] = []

    def create() -> Request:
        requests.append(Request())
        return requests[-1]

    port = SimpleNamespace(shape=(2, 5), element_type=SimpleNamespace(to_dtype=lambda: "float32"))
    compiled = SimpleNamespace(outputs=[port], create_infer_request=create)
    pieces, x = Pieces(compiled, rows=2, threads=2), torch.randn(16, 5)
    requests[failing].fails = "no memory is left"
    with pytest.raises(RuntimeError, match="no memory is left"):
        pieces([x])
    assert not any(request.runs for request in requests)
    requests[failing].fails = ""
    assert torch.equal(pieces([x])[0], x)


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


def test_mixed_precision_is_closer_than_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(4, 16, 64)
    errors = {
        precision: fxopt.lower(model, x, "openvino", precision=precision).relative_error
        for precision in ("f32", "bf16", "mixed")
    }
    if errors["bf16"] < 1e-4:  # type: ignore[operator]
        pytest.skip("OpenVINO has no kernels for bfloat16 on this CPU")
    assert errors["f32"] < errors["mixed"] < 0.5 * errors["bf16"]  # type: ignore[operator]


def test_mixed_precision_keeps_sums_normalisations_and_what_reads_the_inputs(tmp_path: Path) -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4))
    fxopt.lower(body.eval(), torch.randn(2, 4), "openvino", precision="mixed").save(tmp_path)
    kept: dict[str, list[bool]] = defaultdict(list)
    for layer in ElementTree.parse(tmp_path / "model.xml").iter("layer"):
        mark = layer.find("rt_info/attribute[@name='DisablePrecisionConversion']")
        kept[str(layer.get("type"))].append(mark is not None)
    assert kept.pop("MatMul") == [True, False], "of two products the one that reads an input"
    assert all(kept.pop("Add") + kept.pop("MVN"))
    assert not any(chain.from_iterable(kept.values()))


def test_an_openvino_that_cannot_keep_operators_in_float32_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "_MARKED", mixed._MARKED.replace(mixed._ATTRIBUTE, "NeverHeardOf"))
    with pytest.raises(EngineError, match="this version can't keep operators in float32; upgrade it"):
        fxopt.lower(nn.Linear(3, 2).eval(), torch.randn(2, 3), "openvino", precision="mixed")


class Patches(nn.Module):
    """A convolution and a linear layer of as many channels, whose zero points are one constant of the exported file."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return torch.as_tensor(tokens + self.down(torch.relu(self.up(tokens))))


def test_layers_that_share_zero_points_run_on_integers() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    passes = [PTQ(target="openvino"), QuantizeFreeze()]
    frozen = fxopt.optimize(Patches().eval(), x, passes, devices=(), calibration_data=[x]).module
    reasons = [skip.reason for skip in fxopt.lower(frozen, x, "openvino").reasons]
    assert reasons == ["operators on integers: 2 FullyConnected, 1 Convolution"]


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.get_buffer("zeros")


def test_zeros_that_widen_what_they_are_taken_from_stay() -> None:
    x = torch.arange(2).reshape(2, 1)
    assert torch.equal(fxopt.lower(Widens().eval(), x, "openvino")(x), x.expand(2, 3))
