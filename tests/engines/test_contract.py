"""What every executable must do, whatever runs it."""

from __future__ import annotations

import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import Inputs
from fxopt.engines import ENGINES, Built, Engine, Sizes
from fxopt.engines.lower import build
from fxopt.engines.onednn import OneDNN
from fxopt.engines.signature import Signature
from fxopt.errors import ArtifactError, EngineError, SpecError
from fxopt.relative_error import relative_error
from tests.capture.odd import ODD
from tests.models import DYNAMIC, STATIC, Case, StagedCNN

CASES = {**STATIC, **DYNAMIC}
IN_PROCESS = ("eager", "onednn", "sparse")


def assert_agree(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal nesting, shapes and dtypes; values within the tolerance."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert relative_error(expected, found) <= tolerance
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_agree(one, two, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance)
    else:
        assert found == expected


@pytest.mark.parametrize("engine", IN_PROCESS)
@pytest.mark.parametrize("name", CASES)
def test_runs_what_the_module_runs(name: str, engine: str) -> None:
    case: Case = CASES[name]
    model, example = case.build(), case.example()
    executable = fxopt.lower(model, Inputs(example, case.kwargs), engine)
    assert executable.relative_error is not None
    assert executable.relative_error < 1e-5
    with torch.no_grad():
        assert_agree(executable(*example, **case.kwargs), model(*example, **case.kwargs))
        if name not in DYNAMIC:
            fresh = case.example(seed=5)
            assert_agree(executable(*fresh, **case.kwargs), model(*fresh, **case.kwargs))


@pytest.mark.parametrize("name", ["staged_cnn", "conv_zoo", "encoder", "mixture", "recurrent"])
def test_runs_what_passes_made_of_it(name: str) -> None:
    case: Case = CASES[name]
    model, example = case.build(), case.example()
    result = fxopt.optimize(model, example, "clean,fuse", devices=())
    executable = fxopt.lower(result.module, example, "onednn")
    with torch.no_grad():
        assert_agree(executable(*example), model(*example))


@pytest.fixture
def cnn() -> tuple[nn.Module, torch.Tensor]:
    case = STATIC["staged_cnn"]
    return case.build(), case.example()[0]


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_the_module_is_not_changed_and_not_shared(engine: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    before = copy.deepcopy(model.state_dict())
    executable = fxopt.lower(model, x, engine)
    expected = executable(x)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_agree(executable(x), expected, 0)


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_copies_and_pickles_build_again_without_measuring(
    engine: str, cnn: tuple[nn.Module, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = cnn
    executable = fxopt.lower(model, x, engine)
    expected, choices = executable(x), executable.choices
    monkeypatch.setattr("fxopt.engines.onednn.choose", lambda *_: pytest.fail("it measured"))
    for duplicate in (copy.deepcopy(executable), pickle.loads(pickle.dumps(executable))):
        assert_agree(duplicate(x), expected, 0)
        assert duplicate.choices == choices
        own = {parameter.data_ptr() for parameter in executable.parameters()}
        assert not own & {parameter.data_ptr() for parameter in duplicate.parameters()}


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_a_copy_holds_plain_weights_and_builds_when_it_is_called(
    engine: str, cnn: tuple[nn.Module, torch.Tensor]
) -> None:
    model, x = cnn
    executable = fxopt.lower(model, x, engine)
    copied = pickle.loads(pickle.dumps(executable))
    assert copied._built is None
    plain = fxopt.capture(model, (x,)).module.state_dict()
    assert list(copied.state_dict()) == [f"module.{name}" for name in plain]
    assert all(torch.equal(value, plain[name.removeprefix("module.")]) for name, value in copied.state_dict().items())
    copied(x)
    assert copied._built is not None


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_saves_and_loads(engine: str, cnn: tuple[nn.Module, torch.Tensor], tmp_path: Any) -> None:
    model, x = cnn
    executable = fxopt.lower(model, x, engine)
    executable.save(tmp_path / "lowered")
    facts = json.loads((tmp_path / "lowered" / "engine.json").read_text())
    assert facts["engine"] == engine
    assert facts["choices"] == executable.choices
    loaded = torch.load(tmp_path / "lowered" / "executable.pt", weights_only=False)
    assert_agree(loaded(x), executable(x), 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="choose a directory"):
        executable.save(tmp_path / "file" / "below")


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_new_weights_are_seen(engine: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    executable = fxopt.lower(model, x, engine)
    other = StagedCNN().eval()
    executable.module.load_state_dict(other.state_dict())
    executable.load_state_dict({f"module.{name}": value for name, value in other.state_dict().items()})
    assert executable.relative_error is None, "nothing was measured with these weights"
    with torch.no_grad():
        assert_agree(executable(x), other(x))


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_new_weights_of_a_module_around_it_are_seen(engine: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    around = nn.Sequential(fxopt.lower(model, x, engine))
    other = nn.Sequential(fxopt.lower(StagedCNN().eval(), x, engine))
    around.load_state_dict(other.state_dict())
    assert_agree(around(x), other(x))


def test_the_example_is_a_copy_of_its_own(cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    rows = torch.cat([x] * 100).requires_grad_()
    executable = fxopt.lower(model, rows[:2] * 1)
    copy.deepcopy(executable)  # torch copies no tensor that autograd has computed
    executable = fxopt.lower(model, rows.detach()[:2])
    assert len(pickle.dumps(executable)) < rows.nbytes


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_threads_may_share_what_is_not_built_yet(engine: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    lowered = fxopt.lower(model, x, engine)
    expected = lowered(x)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            executable = copy.deepcopy(lowered)
            for found in threads.map(executable, [x] * 8):
                assert_agree(found, expected)


REFUSED_CALLS = {
    "another dtype": (lambda e, x: e(x.double()), "input 0 is 2x3x8x8 float64 on cpu, it was built for 2x3x8x8"),
    "another device": (lambda e, x: e(x.to("meta")), "on meta, it was built for"),
    "another rank": (lambda e, x: e(x[0]), "input 0 is 3x8x8 float32"),
    "no tensor": (lambda e, x: e(3), "input 0 is a int, it was built for"),
    "more arguments": (lambda e, x: e(x, x), "takes no such call: too many positional arguments"),
    "a list": (lambda e, x: e([x]), "input 0 is a list, it was built for 2x3x8x8"),
    "a gradient": (lambda e, x: e(x.clone().requires_grad_()), "requires a gradient"),
    "autocast": (lambda e, x: torch.autocast("cpu")(e)(x), "outside of autocast"),
    "training": (lambda e, x: e.train(), "cannot train"),
    "a trained parameter": (lambda e, x: e.requires_grad_(), "cannot train"),
    "half": (lambda e, x: e.half(), "was built for torch.float32 on 'cpu', not for torch.float16"),
    "a move": (lambda e, x: e.to("meta"), "not for torch.float32 on 'meta'"),
}


@pytest.mark.parametrize("engine", IN_PROCESS)
@pytest.mark.parametrize("what", REFUSED_CALLS)
def test_refuses_what_it_was_not_built_for(what: str, engine: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    executable = fxopt.lower(model, x, engine)
    call, message = REFUSED_CALLS[what]
    with pytest.raises(EngineError, match=message):
        call(executable, x)
    executable.eval().to("cpu").requires_grad_(False)
    assert_agree(executable(x), executable(x), 0)


def test_a_guard_of_the_capture_is_an_engine_error() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.shape[2] > 6 else x

    executable = fxopt.lower(Sized().eval(), torch.randn(1, 3, 8, 8), "onednn")
    assert executable(torch.randn(2, 3, 9, 7)).shape == (2, 4, 7, 5)
    only_advice = r"x\.shape\[2\] > 6 \(\S+\), but it is 5 here; lower the module again with such inputs$"
    with pytest.raises(EngineError, match=only_advice):
        executable(torch.randn(1, 3, 5, 5))


@pytest.mark.parametrize("engine", IN_PROCESS)
def test_an_error_in_a_region_of_autocast_leaves_the_mode_of_the_caller(engine: str) -> None:
    class Cast(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x) + y

    executable = fxopt.lower(Cast(4, 4).eval(), (torch.randn(3, 4), torch.randn(3, 4)), engine)
    with pytest.raises(RuntimeError, match="must match"):
        executable(torch.randn(3, 4), torch.randn(2, 4))
    assert not torch.is_autocast_enabled("cpu")


@dataclass(frozen=True)
class Broken(Engine):
    """Gives what its option says."""

    name: ClassVar[str] = "broken"
    sizes: ClassVar[Sizes] = Sizes.BATCH
    fault: str = ""

    def build(self, module: Any, inputs: Any, choices: Any) -> Built:
        faults = {"value": lambda y: y + 1e-2, "shape": lambda y: y[:1], "dtype": lambda y: y.double(),
                  "nesting": lambda y: (y,), "": lambda y: y}  # fmt: skip
        return Built(lambda x: faults[self.fault](module(x)))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("value", "differs from that of the module by .*allowed 1e-04"),
        ("shape", r"gives \(1, 5\) torch.float32 in place of \(2, 5\)"),
        ("dtype", r"torch.float64 in place of \(2, 5\) torch.float32"),
        ("nesting", "in place of"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_used(
    fault: str, message: str, cnn: tuple[nn.Module, torch.Tensor]
) -> None:
    model, x = cnn
    with pytest.raises(EngineError, match=message):
        build(Broken(fault), model, Inputs((x,)))


class Cancelling(nn.Module):
    """Loses digits: float32 rounds what it gives by more than an engine may be off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + 4096) - 4096


@dataclass(frozen=True)
class Wide(Engine):
    """Rounds less than torch does, and adds what its option says."""

    name: ClassVar[str] = "wide"
    offset: float = 0.0

    def build(self, module: Any, inputs: Any, choices: Any) -> Built:
        return Built(lambda x: module.linear(x) + self.offset)


def test_an_engine_may_differ_by_the_rounding_of_the_module_itself() -> None:
    model, x = Cancelling().eval(), torch.randn(8, 4)
    with torch.no_grad():
        exact, rounded = model.linear(x), model(x)
    own = relative_error(exact, rounded)
    assert own > 1e-4
    assert_agree(build(Wide(), model, Inputs((x,)))(x), exact)
    farther = build(Wide(offset=3 * own * float(exact.abs().max())), model, Inputs((x,))).relative_error
    assert farther is not None and farther > 2 * own
    with pytest.raises(EngineError, match="differs from that of the module"):
        build(Wide(offset=1e-2), model, Inputs((x,)))


class Running(nn.Module):
    """Takes away a mean that it keeps; it may return the memory that it keeps it in."""

    mean: torch.Tensor

    def __init__(self, *, gives_mean: bool) -> None:
        super().__init__()
        self.gives_mean = gives_mean
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.linear(x)
        self.mean.mul_(0.9).add_(x.mean(0))
        return (x - self.mean, self.mean) if self.gives_mean else (x - self.mean,)


@pytest.mark.parametrize("gives_mean", [False, True])
@pytest.mark.parametrize("engine", IN_PROCESS)
def test_building_and_checking_leave_buffers_and_random_streams_as_they_were(engine: str, gives_mean: bool) -> None:
    model, x = Running(gives_mean=gives_mean).eval(), torch.randn(3, 4)
    with torch.no_grad():
        model.linear.weight[:2] = 0
    before = torch.get_rng_state()
    executable = fxopt.lower(model, x, engine)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for _ in range(3):
            assert_agree(executable(x), model(x))
    assert_agree(executable.module.mean, model.mean)


class Counting(nn.Module):
    """Counts its calls in a plain attribute; engines try its graph while building."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(6, 6)
        nn.init.zeros_(self.linear.weight[:5])
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(self.conv(x)) * self.calls


STATEFUL = {
    "counting": Case(Counting, lambda: (torch.randn(2, 3, 8, 8),)),
    **{name: ODD[name] for name in ("counter", "hidden_state", "history", "initialized_by_data", "plain_written")},
}


@pytest.mark.parametrize("engine", IN_PROCESS)
@pytest.mark.parametrize("name", STATEFUL)
def test_building_and_checking_leave_attributes_as_they_were(name: str, engine: str) -> None:
    case = STATEFUL[name]
    model, example = case.build(), case.example()
    executable = fxopt.lower(model, example, engine)
    with torch.no_grad():
        for seed in (1, 5, 6):
            assert_agree(executable(*case.example(seed)), model(*case.example(seed)))


class Sparse(nn.Module):
    """Holds what lies in no plain memory, and gives a number beside its tensor."""

    table: torch.Tensor

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.register_buffer("table", torch.eye(4).to_sparse(layout=layout))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return self.table @ x, 3


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_state_of_other_layouts_stands_beside_outputs_that_are_no_tensors(layout: torch.layout) -> None:
    model, x = Sparse(layout).eval(), torch.randn(4, 2)
    assert_agree(fxopt.lower(model, x, "eager")(x), model(x))


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor, shift: Any) -> torch.Tensor:
        return x if np.isnan(shift).any() else x + float(np.sum(shift))


@pytest.mark.parametrize(
    ("shift", "same", "other"),
    [
        (float("nan"), float("nan"), 1.0),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), np.array([2.0, 2.0])),
    ],
)
def test_values_that_are_no_tensors_are_held_to_those_of_the_example(shift: Any, same: Any, other: Any) -> None:
    x = torch.ones(2)
    executable = fxopt.lower(Shifted().eval(), (x, shift), "onednn")
    assert_agree(executable(x, same), x)
    with pytest.raises(EngineError, match=r"input 1 is .*, it was built for"):
        executable(x, other)


def test_sizes_that_an_engine_fixes_are_held(cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    executable = build(Broken(), model, Inputs((x,)))
    assert executable(torch.cat([x, x])).shape == (4, 5)
    with pytest.raises(EngineError, match="only the batch size may differ"):
        executable(F.pad(x, (0, 1)))


@pytest.mark.parametrize(("one", "other"), [(4, 1), (1, 4), (2, 3), (0, 3), (3, 0), (0, 4), (4, 0)])
def test_inputs_have_one_batch_size(one: int, other: int) -> None:
    signature = Signature("broken", Inputs((torch.zeros(4, 2), torch.zeros(()), torch.zeros(4, 3))), Sizes.BATCH)
    for rows in (one, other):
        signature.check((torch.zeros(rows, 2), torch.ones(()), torch.zeros(rows, 3)), {})
    with pytest.raises(EngineError, match=f"input 2 is {other}x3 .* the batch size of the inputs before it is {one};"):
        signature.check((torch.zeros(one, 2), torch.ones(()), torch.zeros(other, 3)), {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "onedn"}, "unknown engine 'onedn'; did you mean 'onednn'"),
        ({"engine": "auto"}, "`fxopt.optimize(..., engine='auto')`, choose the fastest"),
        ({"engine": "eager", "threads": 2}, "engine 'eager' has no option 'threads'"),
        ({"engine": "onednn", "tune": 2}, "no option 'tune'; its options are tune_seconds"),
        ({"engine": "onedn{tune=2}"}, "unknown engine 'onedn'; did you mean 'onednn'"),
        ({"engine": "onednn{tune=2}"}, "engine 'onednn' has no option 'tune'; did you mean 'tune_seconds'?"),
        ({"engine": "onednn{tune_seconds=fast}"}, "option 'tune_seconds' of engine 'onednn' is number, not fast"),
        ({"engine": "onednn{tune_seconds=1},eager"}, "expected one engine"),
        ({"engine": "onednn{tune_seconds=1}", "tune_seconds": 2}, "option 'tune_seconds' is given twice"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str, cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    with pytest.raises((EngineError, SpecError), match=re.escape(message)):
        fxopt.lower(model, x, **arguments)


def test_refuses_a_module_that_trains(cnn: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = cnn
    model.stem.bn.train()
    with pytest.raises(EngineError, match=r"'stem.bn' is in training mode; call .eval"):
        fxopt.lower(model, x)


def test_refuses_another_device() -> None:
    with pytest.raises(EngineError, match=r"runs on 'cpu', but the module and its inputs are on cpu, meta"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2, device="meta"))


def test_an_engine_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(EngineError, match="cannot run here: this torch has no oneDNN; `pip install torch`"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "onednn")
    assert OneDNN().unavailable()


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_says_what_its_options_do(name: str) -> None:
    import dataclasses

    kind = ENGINES[name]
    assert kind.__doc__
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.metadata.get("help") for field in dataclasses.fields(kind))  # type: ignore[arg-type]


def test_numbers_read_off_tensors_may_be_rounded() -> None:
    case = DYNAMIC["early_exit"]
    model, example = case.build(), case.example()
    executable = build(Rounding(), model, Inputs(example))
    assert executable.relative_error is not None
    assert 0 < executable.relative_error < 1e-5


@dataclass(frozen=True)
class Rounding(Engine):
    """Gives floats that differ in the last digits."""

    name: ClassVar[str] = "rounding"

    def build(self, module: Any, inputs: Any, choices: Any) -> Built:
        def run(x: torch.Tensor) -> Any:
            y, depth, confidences = module(x)
            return y, depth, [one * (1 + 1e-6) for one in confidences]

        return Built(run)
