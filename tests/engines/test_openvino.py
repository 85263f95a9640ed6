"""OpenVINO: a batch in pieces where rows are independent, and what runs on integers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.engines import Executable
from fxopt.engines.openvino import rows as choosing
from fxopt.engines.openvino.complaint import complaint
from fxopt.engines.openvino.session import Pieces
from passes import PTQ, QuantizeFreeze
from tests.engines.test_contract import assert_agree
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


@pytest.mark.parametrize(("long_seconds", "tried"), [(0.0, ["0", "1"]), (60.0, ["0", "1", "2"])])
def test_a_batch_that_takes_long_is_tried_in_single_rows_alone(
    long_seconds: float, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(choosing, "_LONG_SECONDS", long_seconds)

    def larger_pieces_are_faster(calls: dict[str, object], seconds: float) -> dict[str, float]:
        timed.extend(calls)
        return {name: 1.0 / (1 + int(name)) for name in calls}

    monkeypatch.setattr(choosing, "shortest", larger_pieces_are_faster)
    executable, inputs = lowered(alone)
    assert timed == tried
    assert executable.choices == {"rows": int(tried[-1])}
    torch.testing.assert_close(executable(*inputs), alone(*inputs))


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
    passes = [PTQ(target="openvino", weights="int7"), QuantizeFreeze()]
    frozen = fxopt.optimize(Patches().eval(), x, passes, devices=(), calibration_data=[x]).module
    reasons = [skip.reason for skip in fxopt.lower(frozen, x, "openvino").reasons]
    assert reasons == ["operators on integers: 2 FullyConnected, 1 Convolution"]


@pytest.mark.parametrize("bits", [4, 8])
def test_gray_levels_that_would_lie_between_two_steps_are_rounded_as_simulated(bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randint(0, 17, (8, 1, 8, 8)) / 16
    passes = [PTQ(target="openvino", weights="int4", activations=f"uint{bits}"), QuantizeFreeze()]
    frozen = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module
    with torch.no_grad():
        assert_agree(fxopt.lower(frozen, x, "openvino")(x), frozen(x))


class Widens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(3, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.get_buffer("zeros")


def test_zeros_that_widen_what_they_are_taken_from_stay() -> None:
    x = torch.arange(2).reshape(2, 1)
    assert torch.equal(fxopt.lower(Widens().eval(), x, "openvino")(x), x.expand(2, 3))


READING = """Exception from src/inference/src/cpp/core.cpp:84:
Check 'false' failed at src/frontends/common_translators/src/unconverted_ops_report.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted. Failed operations detailed log:
-- ScatterND-20 with a message:
While validating ONNX node '<Node(ScatterND): val_287>': Check 'rank' failed at src/core/base.hpp:43:
Rank of updates must be rank of inputs + rank of indices

Summary:
-- Conversion is failed for: ScatterND-20
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            READING,
            "Model wasn't fully converted. Failed operations detailed log: -- ScatterND-20 with a message: "
            "Rank of updates must be rank of inputs + rank of indices",
        ),
        ("Exception from src/infer.cpp:1:\n\n[CPU] no primitive", "[CPU] no primitive"),
        ("Exception from src/infer.cpp:1:", "Exception from src/infer.cpp:1:"),
        ("x" * 400, "x" * 297 + "..."),
    ],
)
def test_errors_of_openvino_say_in_one_line_what_is_wrong(message: str, expected: str) -> None:
    assert complaint(RuntimeError(message)) == expected
