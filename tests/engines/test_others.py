"""Engines that compile or export: one build each is slow, so few models, and all that is asked of each."""

from __future__ import annotations

import copy
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import fxopt
from fxopt import Inputs
from fxopt.engines import ENGINES
from fxopt.engines.contract import ASKED
from fxopt.errors import EngineError
from fxopt.modules import without_rounding
from fxopt.nested import flatten
from fxopt.relative_error import relative_error
from fxopt.report import render
from passes import PTQ, Fuse, QuantizeFreeze
from tests.engines.test_contract import REFUSED_CALLS, Running, assert_agree
from tests.models import DYNAMIC, STATIC


def needs(engine: str) -> None:
    reason = ENGINES[engine]().unavailable()
    if reason is not None:
        pytest.skip(reason)


def _if_there(engine: str) -> Any:
    reason = ENGINES[engine]().unavailable()
    return pytest.param(engine, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))


EXPORTING = [_if_there("onnxruntime"), _if_there("openvino")]


class Nested(nn.Module):
    """Dicts, lists and keyword arguments, an input that is no tensor, and an output used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, parts: dict[str, Any], *, scale: torch.Tensor, twice: bool = False) -> dict[str, Any]:
        y = self.fc(parts["x"]) * scale
        return {"y": y, "all": [y * 2 if twice else y, parts["rest"][0] + 1]}


class Asking(nn.Module):
    """Asks something of a tensor: with `sizes` alone in it, or what the input holds."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        rows = torch.arange(x.shape[0])
        asked = {
            "sizes": lambda: (positions.diff() == 1).all(),
            "a number of sizes": lambda: positions.sum().item() == 10,
            "rows": lambda: (rows < 5).all(),
            "this many rows": lambda: (rows < 3).all(),
            "the number of rows": lambda: x.shape[0] <= 5,
            "no more rows": lambda: x.shape[0] <= 3,
            "an odd number of rows": lambda: x.shape[0] % 2 == 1,
            "how often rows hold five": lambda: x.shape[0] // 5 == 0,
            "the input": lambda: (x > 0).all(),
        }[self.of]
        return x * 2 if asked() else x * 3


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize("of", ["sizes", "a number of sizes"])
def test_what_fixed_sizes_decide_is_decided(of: str, engine: str) -> None:
    executable = fxopt.lower(Asking(of).eval(), torch.ones(3, 5), engine)
    assert not executable.reasons
    torch.testing.assert_close(executable(torch.ones(7, 5)), torch.full((7, 5), 2.0))


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize(
    ("of", "held", "broken"),
    [
        ("rows", (5, 4, 5), 7),
        ("the number of rows", (5, 4, 5), 7),
        ("no more rows", (2, 1, 3), 4),
        ("an odd number of rows", (1, 5), 4),
        ("how often rows hold five", (4, 3), 5),
    ],
)
def test_what_the_number_of_rows_decides_is_asked_for_each(
    of: str, held: tuple[int, ...], broken: int, engine: str
) -> None:
    executable = fxopt.lower(Asking(of).eval(), torch.ones(3, 5), engine)
    assert [skip.reason for skip in executable.reasons] == [ASKED.reason]
    for rows in held:
        torch.testing.assert_close(executable(torch.ones(rows, 5)), torch.full((rows, 5), 2.0))
    with pytest.raises(EngineError, match=r"the captured graph holds for .*; lower the module again"):
        executable(torch.ones(broken, 5))


class DoubledIfMany(torch.autograd.Function):
    """Decides by the number of rows where no graph shows it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 2 else x * 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class Handed(nn.Module):
    """Hands its input to a function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Drawing(nn.Module):
    """Decides by the number of rows in Python code that stays opaque."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if random.random() < 0 or x.shape[0] > 2 else x


UNSEEN: dict[str, Callable[[], nn.Module]] = {
    "an autograd function": lambda: Handed(lambda x: DoubledIfMany.apply(x)),
    "an opaque module": Drawing,
}


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize("name", UNSEEN)
def test_what_unseen_code_decides_by_the_number_of_rows_is_asked(name: str, engine: str) -> None:
    model = UNSEEN[name]().eval()
    executable = fxopt.lower(model, torch.ones(4, 5), engine)
    assert [skip.reason for skip in executable.reasons] == [ASKED.reason]
    torch.testing.assert_close(executable(torch.ones(3, 5)), model(torch.ones(3, 5)))
    with pytest.raises(EngineError, match="for 2x5 float32: lower the module again with such inputs"):
        executable(torch.ones(2, 5))


@pytest.mark.parametrize("engine", EXPORTING)
def test_one_row_is_no_batch_where_the_module_takes_it_for_none(engine: str) -> None:
    executable = fxopt.lower(Handed(lambda x: x.unsqueeze(-1).squeeze() * 2).eval(), torch.ones(4, 5), engine)
    assert executable(torch.ones(3, 5)).shape == (3, 5)
    with pytest.raises(EngineError, match="2 dimensions after 'squeeze'"):
        executable(torch.ones(1, 5))


@pytest.mark.parametrize("engine", EXPORTING)
def test_where_only_this_number_of_rows_is_allowed_it_is_fixed(engine: str) -> None:
    executable = fxopt.lower(Asking("this many rows").eval(), torch.ones(3, 5), engine)
    assert "the batch size is fixed" in executable.reasons[0].reason
    for each in (executable, pickle.loads(pickle.dumps(executable))):
        torch.testing.assert_close(each(torch.ones(3, 5)), torch.full((3, 5), 2.0))
        with pytest.raises(EngineError, match=r"input 0 is 7x5 .*, it was built for 3x5 .*, and its sizes are fixed"):
            each(torch.ones(7, 5))


def test_what_the_input_decides_is_not_exported() -> None:
    needs("onnxruntime")
    with pytest.raises(EngineError, match="torch cannot export one"):
        fxopt.lower(Asking("the input").eval(), torch.ones(3, 5), "onnxruntime")


class Optional(nn.Module):
    """Takes a tensor and, in the middle, one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: Any = 0) -> torch.Tensor:
        return self.linear(x if scale is None else x * scale) + shift


@pytest.mark.parametrize("engine", ["eager", "onednn", *EXPORTING])
def test_arguments_may_be_named_in_any_order_and_left_out(engine: str) -> None:
    model = Optional().eval()
    x, shift = torch.randn(3, 4), torch.randn(3, 4)
    executable = fxopt.lower(model, {"shift": torch.randn(2, 4), "x": torch.randn(2, 4)}, engine)
    expected = model(x, shift=shift).detach()
    assert_agree(executable(x, shift=shift), expected)
    assert_agree(executable(shift=shift, x=x), expected)
    assert_agree(pickle.loads(pickle.dumps(executable))(x, None, shift), expected)
    with pytest.raises(EngineError, match="input 1 is 3x4 float32 on cpu, it was built for None"):
        executable(x, scale=x, shift=shift)
    with pytest.raises(EngineError, match="takes no such call: got an unexpected keyword argument 'shifted'"):
        executable(x, shifted=shift)


class Starred(nn.Module):
    """Takes whatever it is given, as models that hand arguments on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *others: torch.Tensor, **named: Any) -> torch.Tensor:
        x = self.linear(x)
        for other in others:
            x = 2 * x - other
        for name in ("shift", "state"):
            if named.get(name) is not None:
                x = 3 * x + named[name]
        return x


STARRED = {
    "None by name": lambda x: Inputs((x,), {"state": None}),
    "tensors by name": lambda x: Inputs((x,), {"state": x * 2, "shift": x * 3}),
    "tensors by place": lambda x: Inputs((x, x * 2, x * 3)),
    "both": lambda x: Inputs((x, x * 2, x * 3), {"state": x * 5}),
}


@pytest.mark.parametrize("given", STARRED)
@pytest.mark.parametrize("engine", EXPORTING)
def test_what_a_parameter_with_stars_takes_has_a_free_batch_size(engine: str, given: str) -> None:
    model = Starred().eval()
    executable = fxopt.lower(model, STARRED[given](torch.randn(2, 4)), engine)
    assert not executable.reasons
    for rows in (2, 5, 1):
        inputs = STARRED[given](torch.randn(rows, 4))
        assert_agree(inputs.call(executable), inputs.call(model).detach())


@pytest.mark.parametrize("engine", EXPORTING)
def test_exports_with_nested_inputs_and_a_free_batch_size(engine: str, tmp_path: Path) -> None:
    model = Nested().eval()

    def inputs(batch: int) -> Inputs:
        parts = {"x": torch.randn(batch, 4), "rest": [torch.randint(0, 9, (batch, 2))]}
        return Inputs((parts,), {"scale": torch.randn(batch, 1), "twice": True})

    example = inputs(1)
    executable = fxopt.lower(model, example, engine)
    assert executable.build_seconds > 0
    assert not executable.reasons
    for given in (example, inputs(1), inputs(5)):
        with torch.no_grad():
            assert_agree(executable(*given.args, **given.kwargs), model(*given.args, **given.kwargs))
    with pytest.raises(EngineError, match="the batch size of the inputs before it is 2"):
        executable({"x": torch.randn(2, 4), "rest": [torch.randint(0, 9, (3, 2))]}, scale=torch.randn(2, 2), twice=True)
    with pytest.raises(EngineError, match="input 3 is False, it was built for True"):
        executable(*example.args, **{**example.kwargs, "twice": False})
    executable.save(tmp_path)
    assert (tmp_path / {"onnxruntime": "model.onnx", "openvino": "model.xml"}[engine]).is_file()
    duplicate = copy.deepcopy(executable)
    assert_agree(duplicate(*example.args, **example.kwargs), executable(*example.args, **example.kwargs), 0)


@dataclass
class Scored:
    """What a model gives, with numbers."""

    scores: torch.Tensor
    loss: torch.Tensor | None
    width: int
    rows: int


class Scores(nn.Module):
    """Gives what is no tensor beside its scores."""

    def __init__(self, give: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(self.layer(x))


WITH_CONSTANTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "no loss": lambda scores: (scores, None),
    "settings": lambda scores: {"scores": scores, "kind": "logits", "classes": 3, "parts": [scores * 2, None]},
    "numbers of an object": lambda scores: Scored(scores, None, scores.shape[1], 2),
}


@pytest.mark.parametrize("given", WITH_CONSTANTS)
@pytest.mark.parametrize("engine", EXPORTING)
def test_constants_among_the_outputs_are_given_with_them(engine: str, given: str) -> None:
    model = Scores(WITH_CONSTANTS[given]).eval()
    executable = fxopt.lower(model, torch.randn(2, 4), engine)
    x = torch.randn(5, 4)
    with torch.no_grad():
        found, expected = flatten(executable(x)), flatten(model(x))
    assert found[1] == expected[1]
    assert_agree(found[0], expected[0])


def test_the_batch_size_is_fixed_where_an_object_among_the_outputs_holds_it() -> None:
    needs("onnxruntime")
    model = Scores(lambda scores: Scored(scores, None, 3, scores.shape[0])).eval()
    executable = fxopt.lower(model, torch.randn(2, 4), "onnxruntime")
    assert executable(torch.randn(2, 4)).rows == 2
    assert [skip.reason for skip in executable.reasons] == [
        "the batch size is fixed: a number that it gives follows it"
    ]
    with pytest.raises(EngineError, match="its sizes are fixed"):
        executable(torch.randn(5, 4))


class OfDict(nn.Module):
    """Takes a dict by position, and nothing by name."""

    def forward(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return parts["x"] - 2 * parts["y"]


@pytest.mark.parametrize("engine", EXPORTING)
def test_a_dict_that_comes_last_is_an_argument_by_position(engine: str) -> None:
    executable = fxopt.lower(OfDict().eval(), ({"x": torch.zeros(2, 3), "y": torch.zeros(2, 3)},), engine)
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    assert_agree(executable({"x": x, "y": y}), x - 2 * y)


class Difference(nn.Module):
    """Takes two tensors."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x - 2 * y


@pytest.mark.parametrize("engine", EXPORTING)
def test_an_example_of_the_same_tensor_twice_takes_different_ones_later(engine: str) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    executable = fxopt.lower(Difference().eval(), (x, x), engine)
    assert_agree(executable(x, y), x - 2 * y)
    assert_agree(executable(x, x), -x)


@pytest.mark.parametrize("engine", EXPORTING)
@pytest.mark.parametrize("name", ["conv_zoo", "encoder"])
def test_runs_what_the_module_runs(name: str, engine: str) -> None:
    case = STATIC[name]
    model, example = case.build(), case.example()
    executable = fxopt.lower(model, example, engine)
    with torch.no_grad():
        assert_agree(executable(*case.example(seed=5)), model(*case.example(seed=5)))


@pytest.mark.parametrize("engine", EXPORTING)
def test_refuses_what_it_was_not_built_for(engine: str) -> None:
    case = STATIC["staged_cnn"]
    (x,) = case.example()
    executable = fxopt.lower(case.build(), x, engine)
    for call, message in REFUSED_CALLS.values():
        with pytest.raises(EngineError, match=message):
            call(executable, x)


def test_onnxruntime_runs_as_many_threads_as_torch_which_do_not_spin_past_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("onnxruntime")
    import onnxruntime

    session, seen = onnxruntime.InferenceSession, []

    def watched(path: Any, options: Any, **rest: Any) -> Any:
        seen.append((options.intra_op_num_threads, options.get_session_config_entry("session.force_spinning_stop")))
        return session(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "onnxruntime")
    assert seen == [(3, "1")]


def test_openvino_runs_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino")
    import openvino

    core, seen = openvino.Core, []

    class Watched:
        def __init__(self) -> None:
            self.core = core()
            self.read_model = self.core.read_model

        def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
            seen.append(settings["INFERENCE_NUM_THREADS"])
            return self.core.compile_model(model, device, settings)

    monkeypatch.setattr(openvino, "Core", Watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "openvino")
    assert seen == [3]


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(2, 6) * 2


class Halves(nn.Module):
    """Holds for any batch size, but the exporter can't tell in how many parts it falls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = torch.cat([x, x + 1]).chunk(2)
        return one * other


@pytest.mark.parametrize("kind", [Fixed, Halves])
def test_a_fixed_batch_size_is_said_of_the_exporter_which_fixes_it(kind: type[nn.Module]) -> None:
    needs("onnxruntime")
    model, x = kind().eval(), torch.randn(2, 6)
    executable = fxopt.lower(model, x, "onnxruntime")
    assert_agree(executable(x), model(x))
    assert [skip.reason for skip in executable.reasons] == [
        "the batch size is fixed: the exporter takes that of the example, 2, for the only one that the module holds for"
    ]


class Cached(nn.Module):
    """Keys of earlier calls in a tensor of the caller's, which takes those of this one."""

    def forward(self, keys: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        keys[:, 1:2] = new
        return keys * 2


class Spectrum(nn.Module):
    """Gives complex numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x)


class Noisy(nn.Module):
    """Adds what it draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(2, 6)


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...], str]] = {
    "depends on values": (
        lambda: DYNAMIC["router"].build(),
        DYNAMIC["router"].example(),
        "needs an ONNX model, and torch cannot export one: GuardOnDataDependent.*holds runs in the module itself",
    ),
    "gives numbers": (
        lambda: DYNAMIC["early_exit"].build(),
        DYNAMIC["early_exit"].example(),
        "cannot export one|tensors of real numbers that NumPy knows",
    ),
    "gives a number in an object": (
        Scores(lambda scores: Scored(scores, None, 3, scores.sum().item())).eval,  # type: ignore[arg-type]
        (torch.randn(2, 4),),
        "among the outputs holds a number that depends on what the inputs hold: give it as a tensor",
    ),
    "writes an input": (
        Cached().eval,
        (torch.zeros(2, 3), torch.ones(2, 1)),
        "would lose what the module writes into input 0: return the new values",
    ),
    "writes a buffer": (
        Running(gives_mean=False).eval,
        (torch.randn(3, 4),),
        "would lose what the module writes into 'mean'",
    ),
    "bfloat16": (lambda: nn.Linear(3, 2).eval().bfloat16(), (torch.randn(2, 3).bfloat16(),), "not torch.bfloat16"),
    "complex numbers": (
        Spectrum().eval,
        (torch.randn(2, 6),),
        "tensors of real numbers that NumPy knows, not torch.complex64",
    ),
    "random numbers": (Noisy().eval, (torch.randn(2, 6),), "it draws random numbers, and only engines that call torch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_an_error_with_the_reason(name: str) -> None:
    needs("onnxruntime")
    factory, inputs, message = REFUSED[name]
    with pytest.raises(EngineError, match=message):
        fxopt.lower(factory(), inputs, "onnxruntime")


def test_openvino_computes_in_float32_unless_asked() -> None:
    needs("openvino")
    case = STATIC["staged_cnn"]
    model, x = case.build(), case.example()
    assert fxopt.lower(model, x, "openvino").relative_error < 1e-5  # type: ignore[operator]
    assert fxopt.lower(model, x, "openvino", precision="bf16").relative_error < 5e-2  # type: ignore[operator]
    with pytest.raises(EngineError, match="precision is 'f32', 'bf16' or 'mixed', not 'f16'"):
        fxopt.lower(model, x, "openvino", precision="f16")


def test_inductor_compiles() -> None:
    needs("inductor")
    case = STATIC["simple_net"]
    model, (x,) = case.build(), case.example()
    executable, code = run_and_get_code(fxopt.lower, model, x, "inductor")
    assert executable.build_seconds > 0
    assert "frozen_param" in code[0] or "constant" in code[0], "weights are handed on as inputs"
    with torch.no_grad():
        assert_agree(executable(x), model(x))
    with pytest.raises(EngineError, match="requires a gradient"):
        executable(x.clone().requires_grad_())


class WithAnchors(nn.Module):
    """Gives what it computes of its weights alone beside what it computes of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.anchors = nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), self.anchors * 2


def test_what_a_caller_writes_into_an_output_of_inductor_is_gone_at_the_next_call() -> None:
    needs("inductor")
    model, x = WithAnchors().eval(), torch.randn(2, 4)
    executable = fxopt.lower(model, x, "inductor")
    for _ in range(2):
        found = executable(x)
        with torch.no_grad():
            assert_agree(found, model(x))
        found[1].add_(1)


def test_inductor_says_which_sizes_it_fails_for(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("inductor")

    def compiled(module: nn.Module, backend: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            assert x.shape[0] == 2, "expected size 3==2"
            return module(x)  # type: ignore[no-any-return]

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    executable = fxopt.lower(nn.Linear(4, 4).eval(), torch.ones(2, 4), "inductor")
    with pytest.raises(
        EngineError, match=r"AssertionError: expected size 3==2; lower the module again with such inputs"
    ):
        executable(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("engine", "package", "command"),
    [
        ("onnxruntime", "onnxruntime", "pip install onnxruntime"),
        ("openvino", "openvino", r"pip install fxopt\[openvino\]"),
    ],
)
def test_a_missing_package_is_named(engine: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(EngineError, match=f"cannot run here: .*{command}"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), engine)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match="needs a C\\+\\+ compiler; `apt-get install g"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "inductor")


class TestIntegers:
    """A frozen model runs on integers, and says what does not."""

    def frozen(self, target: str, bits: int = 8) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
        x = torch.randn(4, 3, 10, 10)
        passes = [Fuse(), PTQ(target=target, bits=bits), QuantizeFreeze()]  # type: ignore[arg-type]
        return fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module, x

    @pytest.mark.parametrize("engine", EXPORTING)
    def test_outputs_are_those_of_the_simulation(self, engine: str) -> None:
        module, x = self.frozen(engine)
        executable = fxopt.lower(module, x, engine)
        other = torch.randn(7, 3, 10, 10)
        with torch.no_grad():
            wanted = module(other)
        assert (executable(other) - wanted).norm() < 0.05 * wanted.norm()

    @pytest.mark.parametrize("engine", EXPORTING)
    def test_a_ladder_tells_how_outputs_agree_with_the_simulation_and_how_large_the_file_is(self, engine: str) -> None:
        module, x = self.frozen(engine)
        result = fxopt.optimize(module, x, (), devices=(), engine=engine, engine_seconds=1.0)
        rung = result.record["engines"]["rungs"][1]
        told = rung["reasons"][0]["reason"]
        assert re.fullmatch(
            r"against the simulation: argmax equal in \d+\.\d%, (outputs equal|SQNR \d+\.\d dB); its file has "
            r"\d+ KiB",
            told,
        )
        assert told in " ".join(render(result.record, "table").split())

    def test_onnxruntime_tells_what_runs_on_integers(self) -> None:
        module, x = self.frozen("onnxruntime")
        reasons = [skip.reason for skip in fxopt.lower(module, x, "onnxruntime").reasons]
        assert reasons[0].startswith("operators on integers: 2 QLinearConv")
        module, x = self.frozen("generic")
        reasons = [skip.reason for skip in fxopt.lower(module, x, "onnxruntime").reasons]
        assert any(
            "Conv runs in floats: its input and weight are integers, but its output is not (`target=onnxruntime`" in r
            for r in reasons
        )

    def test_narrow_integers_are_judged_by_the_models_own_rounding_and_stay_integers(self) -> None:
        module, x = self.frozen("onnxruntime", bits=3)
        executable = fxopt.lower(module, x, "onnxruntime")
        assert executable.reasons[0].reason.startswith("operators on integers: 2 QLinearConv")
        with torch.no_grad():
            wanted = module(x)
            with without_rounding(module):
                exact = module(x)
        assert executable.rounding == max(0.1, 2 * relative_error(wanted, exact)) > 0.1
        # Steps of the bias are those of 8 bits, so hardly any value meets the other one of two steps.
        assert (executable(x) - wanted).norm() < 0.05 * wanted.norm()

    def test_inductor_multiplies_integers_and_names_what_it_does_not(self) -> None:
        needs("inductor")
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 6, 2, 2))
        model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
        x = torch.randn(4, 3, 8, 8)
        passes = [Fuse(), PTQ(weights="int7"), QuantizeFreeze()]
        module = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module
        executable = fxopt.lower(module, x, "inductor")
        first, *left = executable.reasons
        assert first.reason == "operators on integers: 2 qconv, 1 qlinear"
        assert [skip.where for skip in left] == ["0.3"]
        assert "no integer kernel" in left[0].reason
        # The compiler warns of itself whenever it meets other sizes, and warnings are errors here.
        for given in (x, torch.randn(6, 3, 8, 8)):
            with torch.no_grad():
                wanted = module(given)
            assert (executable(given) - wanted).norm() < 0.05 * wanted.norm()

    def test_inductor_leaves_an_input_that_a_layer_is_added_to(self) -> None:
        needs("inductor")

        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + self.fc(x)

        torch.manual_seed(0)
        model, x = Residual().eval(), torch.randn(4, 8)
        passes = [Fuse(), PTQ(target="inductor", weights="int7"), QuantizeFreeze()]
        module = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module
        executable, kept = fxopt.lower(module, x, "inductor"), x.clone()
        assert executable.reasons[0].reason == "operators on integers: 1 qlinear"
        for _ in range(2):
            with torch.no_grad():
                assert_agree(executable(x), module(x))
            assert torch.equal(x, kept)

    @pytest.mark.parametrize("into", ["input 0", "'total'"])
    def test_inductor_keeps_what_a_module_writes_and_computes_that_in_floats(self, into: str) -> None:
        needs("inductor")

        class Adding(nn.Module):
            total: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)
                self.register_buffer("total", torch.zeros(4, 8))

            def forward(self, sums: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
                return (sums if into == "input 0" else self.total).add_(self.fc(x)) * 2

        torch.manual_seed(0)
        model, x = Adding().eval(), torch.randn(4, 8)
        passes = [Fuse(), PTQ(target="inductor", weights="int7"), QuantizeFreeze()]
        data = [(torch.zeros(4, 8), x)]
        module = fxopt.optimize(model, data[0], passes, devices=(), calibration_data=data).module
        executable = fxopt.lower(module, (torch.zeros(4, 8), x), "inductor")
        assert f"simulated in floats: engine 'inductor' would lose what the module writes into {into}" in (
            executable.reasons[0].reason
        )
        module.get_buffer("total").zero_()
        executable.module.get_buffer("total").zero_()
        found, wanted = torch.zeros(4, 8), torch.zeros(4, 8)
        for _ in range(2):
            with torch.no_grad():
                assert_agree(executable(found, x), module(wanted, x))
            assert_agree(found, wanted)

    def test_the_saved_file_holds_integers(self, tmp_path: Path) -> None:
        module, x = self.frozen("onnxruntime")
        fxopt.lower(module, x, "onnxruntime").save(tmp_path)
        model = onnx.load(tmp_path / "model.onnx")
        weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
        assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.INT8}

    def test_the_saved_file_holds_no_notes_of_the_exporter(self, tmp_path: Path) -> None:
        module, x = self.frozen("onnxruntime")
        fxopt.lower(module, x, "onnxruntime").save(tmp_path)
        assert b"pkg.torch" not in (tmp_path / "model.onnx").read_bytes()

    def test_onednn_leaves_what_is_quantised_to_torch(self) -> None:
        module, x = self.frozen("generic")
        executable = fxopt.lower(module, x, "onednn")
        with torch.no_grad():
            assert_agree(executable(x), module(x))
        assert executable.reasons


class Slopes(nn.Module):
    """What a layer computes and its slopes for each row, which torch's exporter can't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), torch.vmap(torch.func.jacrev(lambda row: self.layer(row)))(x)


def test_an_export_that_fails_leaves_no_transform_of_torch_open() -> None:
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    with pytest.raises(EngineError, match="torch cannot export one"):
        fxopt.lower(Slopes().eval(), torch.randn(2, 3), engine="onnxruntime")
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == depth
