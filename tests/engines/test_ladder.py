"""Choosing an engine: who is built, who drops out, and who is taken."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jsonschema
import pytest
import torch
from torch import nn

import fxopt
from fxopt import Inputs, record, report
from fxopt.artifact import save
from fxopt.bench import Times, Verdict
from fxopt.engines import Executable, builder, candidates, exports, ladder, onednn, openvino
from fxopt.engines.builder import Builder
from fxopt.engines.candidates import Rung
from fxopt.engines.contract import Built, Engine
from fxopt.engines.ladder import Ladder, climb
from fxopt.engines.onednn import OneDNN
from fxopt.engines.openvino import OpenVINO
from fxopt.errors import EngineError, SpecError
from fxopt.relative_error import TOLERANCE, relative_error
from fxopt.verify import Oracle
from passes import QAT
from tests.capture.odd import ODD
from tests.engines.test_contract import Running, assert_agree
from tests.engines.test_others import needs
from tests.models import STATIC
from tests.report.record_example import comparison

CASE = STATIC["staged_cnn"]
HERE = (Rung("eager"), Rung("onednn"))
ALL_RUNGS = candidates.ON_CPU


def verdict_on(ratio: float) -> Verdict:
    return Verdict.FASTER if ratio < 0.98 else Verdict.EQUIVALENT if ratio <= 1.02 else Verdict.SLOWER


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Ratios that measuring gives: by engine, or by the pair of engines that meet at the end."""
    ratios: dict[Any, float] = {}

    def together(before: Any, rungs: list[Rung], *_: Any) -> dict[str, fxopt.Comparison]:
        first = getattr(before, "__self__", None)
        found = {}
        for number, rung in enumerate(rungs):
            assert rung.executable is not None
            name = "cast" if torch.bfloat16 in rung.executable.dtypes else rung.engine
            ratio = ratios[(first.engine.name, name) if isinstance(first, Executable) else name]
            # So much that 0.985 and 0.99 are not told apart in the same rounds.
            noise = (0.993, 1.007) if number % 2 else (1.007, 0.993)
            times = Times((1.0,) * 6, tuple(ratio * factor for factor in noise * 3), (1.0,) * 6)
            found[rung.label] = comparison(verdict_on(ratio), ratio, times=times)
        return found

    monkeypatch.setattr(ladder, "_together", together)
    monkeypatch.setattr(candidates, "ON_CPU", HERE)
    return ratios


def run(asked: str, **options: Any) -> Ladder:
    model, example = CASE.build(), Inputs(CASE.example())
    rewritten = fxopt.capture(model, example.args).module
    return climb(asked, model, rewritten, example, oracle=Oracle(model, example), **options)


CHOICES = {
    "the fastest": ({"eager": 1.0, "onednn": 0.6}, "onednn"),
    "the one that builds sooner, of two as fast": (
        {"eager": 0.99, "onednn": 0.985, ("onednn", "eager"): 1.0},
        "eager",
    ),
    "who wins the last comparison": ({"eager": 0.99, "onednn": 0.985, ("onednn", "eager"): 1.1}, "onednn"),
    "the second, if it wins": ({"eager": 0.985, "onednn": 0.99, ("eager", "onednn"): 0.9}, "onednn"),
    "the one that seems faster, where noise hides it": (
        {"eager": 0.99, "onednn": 0.985, ("onednn", "eager"): 1.03},
        "onednn",
    ),
    "the second that seems faster, where noise hides it": (
        {"eager": 0.985, "onednn": 0.99, ("eager", "onednn"): 0.97},
        "onednn",
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_auto_takes(name: str, measured: dict[Any, float]) -> None:
    ratios, expected = CHOICES[name]
    measured |= ratios
    found = run("auto")
    assert found.chosen is not None
    assert found.chosen.engine == expected
    assert [rung.engine for rung in found.rungs] == ["eager", "onednn"]
    assert all(rung.comparison and rung.relative_error is not None for rung in found.rungs)


def test_two_as_fast_as_each_other_at_the_end_may_not_have_been_before(monkeypatch: pytest.MonkeyPatch) -> None:
    evenly, held_up = (1.0,) * 20, (1.0,) * 6 + (1.24,) * 14
    built = fxopt.lower(nn.ReLU().eval(), torch.ones(2), engine="eager")
    last = comparison(Verdict.EQUIVALENT, 1.0, times=Times((1.0,) * 12, (1.0,) * 12, (1.0,) * 12))
    monkeypatch.setattr(ladder, "_together", lambda before, rungs, *_: {rung.label: last for rung in rungs})
    rungs = [
        Rung("openvino", executable=built, build_seconds=9.0),
        Rung("onednn", executable=built, build_seconds=1.0),
    ]
    for times, taken in ((evenly, "onednn"), (held_up, "openvino")):
        before = [comparison(times=Times(evenly, one, evenly)) for one in (evenly, times)]
        given = [replace(rung, comparison=one) for rung, one in zip(rungs, before, strict=True)]
        assert ladder._fastest(given, Inputs((torch.ones(2),)), torch.device("cpu"), 60.0, 0).engine == taken


def test_measuring_leaves_buffers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "ON_CPU", HERE)
    model, example = Running(gives_mean=False).eval(), Inputs((torch.randn(3, 4),))
    rewritten = fxopt.capture(model, example.args).module
    found = climb("auto", model, rewritten, example, oracle=Oracle(model, example), budget_seconds=1.0)
    assert [rung.dropped for rung in found.rungs] == ["", ""]
    for rung in found.rungs:
        assert rung.executable is not None
        assert not rung.executable.module.get_buffer("mean").any()


def test_measuring_leaves_attributes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "ON_CPU", HERE)
    model, example = ODD["counter"].build(), Inputs(ODD["counter"].example())
    rewritten = fxopt.capture(model, example.args).module
    found = climb("auto", model, rewritten, example, oracle=Oracle(model, example), budget_seconds=1.0)
    expected = model(*example.args)
    for rung in found.rungs:
        assert rung.executable is not None
        assert relative_error(expected, rung.executable(*example.args)) < 1e-5


def test_all_takes_none(measured: dict[Any, float]) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    assert run("all").chosen is None


def test_a_name_takes_that_one_though_it_is_slower(measured: dict[Any, float]) -> None:
    measured |= {"eager": 1.0, "onednn": 1.6}
    found = run("onednn")
    assert found.chosen is not None
    assert found.chosen.engine == "onednn"


def test_a_name_takes_options_in_braces(measured: dict[Any, float]) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    chosen = run("onednn{tune_seconds=0}").chosen
    assert chosen is not None
    assert chosen.label == "onednn{tune_seconds=0.0}"
    assert chosen.executable is not None
    assert chosen.executable.engine == OneDNN(tune_seconds=0.0)
    with pytest.raises(EngineError, match="fewer bits need a bound on the error"):
        run("openvino{precision=bf16}")


@pytest.mark.parametrize("asked", ["openvino{precision=f32}", "cublas{precision=int8}", "cudagraph{tf32=false}"])
def test_an_option_that_says_the_default_rounds_nothing_and_needs_no_bound(asked: str) -> None:
    module = fxopt.capture(CASE.build(), CASE.example()).module
    _, rung = candidates.candidates(asked, module, torch.device("cpu"))
    assert rung == Rung(asked.partition("{")[0])
    assert not rung.is_rounded


def test_who_breaks_the_bound_drops_out(measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    monkeypatch.setattr(Builder, "_errors", lambda _, e, *__: [(3e-3 if e.engine.name == "onednn" else 0.0, 1e-4, 0)])
    found = run("auto")
    assert found.chosen is not None
    assert found.chosen.engine == "eager"
    assert found.rungs[1].dropped == "output 0 differs by 3.00e-03 (allowed 0.0001)"
    assert found.rungs[1].comparison is None
    loose = run("auto", max_error=1e-2).chosen
    assert loose is not None
    assert loose.engine == "onednn"
    with pytest.raises(EngineError, match="output 0 differs"):
        run("onednn")


class OfTwoDtypes(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.bfloat16(), x * 2


@dataclass(frozen=True)
class RoundsLater(Engine):
    """Gives what the module gives, but for inputs that are not the example."""

    name: ClassVar[str] = "rounds later"

    def build(self, module: Any, inputs: Any, choices: Any) -> Built:
        def run(x: torch.Tensor) -> Any:
            narrow, wide = module(x)
            return (narrow, wide) if bool((x == 1).all()) else (narrow * 1.02, wide * 1.001)

        return Built(run)


def test_each_output_is_held_to_its_own_dtype(measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "find", lambda *_: RoundsLater())
    model, x = OfTwoDtypes().eval(), torch.ones(2, 4)
    with pytest.raises(EngineError, match=r"output 1 differs by 1.00e-03 \(allowed 0.0001\)"):
        climb("eager", model, fxopt.capture(model, (x,)).module, Inputs((x,)))


def test_who_fails_drops_out_with_the_reason(measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measured["eager"] = 1.0

    def build(engine: Any, *_: Any) -> Any:
        if engine.name == "onednn":
            raise RuntimeError("out of luck")
        return real(engine, *_)

    real = builder.build
    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(candidates, "ON_CPU", (*HERE, Rung("cudnn"), Rung("openvino", {"precision": "bf16"})))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run("auto")
    assert [rung.dropped.partition(";")[0] for rung in found.rungs] == [
        "",
        "RuntimeError: out of luck",
        "engine 'cudnn' cannot run here: there is no CUDA device",
        "not built: fewer bits need a bound on the error: give a max_error, such as 1e-2",
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_exported_once_for_all_engines(
    fails: bool, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnxruntime")
    needs("openvino")
    measured |= {"eager": 1.0, "onnxruntime": 0.5, "openvino": 0.7}
    tried = []

    def export(module: Any, inputs: Inputs, outputs: Any, free: Any) -> Any:
        tried.append(module)
        if fails:
            raise EngineError("torch cannot export one: out of luck")
        return real(module, inputs, outputs, free)

    real = exports.export
    monkeypatch.setattr(exports, "export", export)
    monkeypatch.setattr(candidates, "ON_CPU", (Rung("eager"), Rung("onnxruntime"), Rung("openvino")))
    found = run("auto")
    assert len(tried) == 1
    why = "engine '{}' needs an ONNX model, and torch cannot export one: out of luck" if fails else ""
    assert [rung.dropped for rung in found.rungs[1:]] == [why.format(rung.engine) for rung in found.rungs[1:]]
    # The files of a ladder are its own.
    if not fails:
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(3, 2), "onnxruntime")
        assert len(tried) == 2


def test_what_the_platform_lacks_drops_out_with_what_would_bring_it(
    measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured["eager"] = 1.0
    brings = {
        "onednn": "this torch has no oneDNN; `pip install torch`",
        "onnxruntime": "ONNX Runtime is not installed; `pip install onnxruntime onnxscript` brings it",
        "openvino": "OpenVINO is not installed; `pip install fxopt[openvino]` brings it",
        "inductor": "torch.compile needs a C++ compiler; `apt-get install g++` brings one",
        "cudnn": "there is no CUDA device; on a machine with one, `pip install torch` brings a build for it",
        "cudagraph": "there is no CUDA device; on a machine with one, `pip install torch` brings a build for it",
    }
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(candidates, "ON_CPU", (HERE[0], *map(Rung, brings)))
    found = run("auto")
    assert found.chosen is found.rungs[0]
    for rung, command in zip(found.rungs[1:], brings.values(), strict=True):
        assert rung.dropped.startswith(f"engine '{rung.engine}' cannot run here: {command}")


CAST = Rung("onednn", passes="cast{dtype=bf16}")


class Narrow(nn.Linear):
    """A layer in bfloat16 between values in float32."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.bfloat16()).float()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither engine says that it has no kernels for bfloat16 on this CPU."""
    monkeypatch.setattr(OneDNN, "in_vain", Engine.in_vain)
    monkeypatch.setattr(OpenVINO, "in_vain", Engine.in_vain)


@pytest.mark.usefixtures("kernels")
def test_an_error_that_is_allowed_lets_layers_run_in_bfloat16(
    tmp_path: Path, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6, "cast": 0.3}
    monkeypatch.setattr(candidates, "ON_CPU", (*HERE, CAST))
    model, x = CASE.build(), CASE.example()[0]
    result = fxopt.optimize(model, x, "clean,fuse", engine="auto", max_error=5e-2, devices=())
    jsonschema.validate(result.record, record.schema())
    engines = result.record["engines"]
    assert engines is not None and engines["chosen"] is not None
    assert engines["rungs"][engines["chosen"]]["label"] == "onednn after cast{dtype=bf16}"
    assert "cast{dtype=bf16}" in report.render(result.record)
    assert result.executable is not None
    assert result.executable.dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in result.module.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_agree(result.executable(x), model(x), 5e-2)
    save(result, tmp_path / "out", {})
    monkeypatch.setattr("fxopt.engines.onednn.choose", lambda *_: pytest.fail("it measured"))
    loaded = fxopt.load(tmp_path / "out", model)
    assert isinstance(loaded, Executable)
    assert_agree(loaded(x), result.executable(x), 0)


class Segments(nn.Module):
    """Gives the class of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).argmax(1)


@pytest.mark.usefixtures("kernels")
def test_classes_are_held_to_the_bound_by_how_many_of_them_differ(
    measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6, "cast": 0.3}
    monkeypatch.setattr(candidates, "ON_CPU", (*HERE, CAST))
    torch.manual_seed(0)
    model, x = Segments().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        narrow = model.to(torch.bfloat16)(x.bfloat16())
        share = (narrow != model.float()(x)).double().mean().item()
    assert 0 < share < 1e-2
    for bound, name in ((1e-2, "cast"), (share / 10, "onednn")):
        chosen = climb("auto", model, fxopt.capture(model, (x,)).module, Inputs((x,)), max_error=bound).chosen
        assert chosen is not None and chosen.executable is not None
        assert (torch.bfloat16 in chosen.executable.dtypes) is (name == "cast")


def test_no_layer_runs_in_bfloat16_unasked(measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    monkeypatch.setattr(candidates, "ON_CPU", (*HERE, CAST))
    assert (
        run("auto").rungs[2].dropped
        == "not built: fewer bits need a bound on the error: give a max_error, such as 1e-2"
    )


@pytest.mark.parametrize(("error", "said"), [(1e-5, "not built: the error of onednn is allowed"), (1e-2, "")])
def test_what_rounds_less_is_built_only_where_the_error_of_what_rounds_more_is_too_large(
    error: float, said: str, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    monkeypatch.setattr(candidates, "ON_CPU", (Rung("onednn"), Rung("eager", closer_than="onednn")))
    monkeypatch.setattr(Builder, "_errors", lambda _, e, *__: [(error if e.engine.name == "onednn" else 0.0, 1e-4, 0)])
    assert run("auto").rungs[1].dropped == said


def test_fewer_bits_that_gain_nothing_on_this_cpu_are_not_built(
    measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("openvino")
    measured |= {"eager": 1.0, "onednn": 0.6}
    monkeypatch.setattr(candidates, "ON_CPU", (*HERE, CAST, Rung("openvino", {"precision": "bf16"})))
    monkeypatch.setitem(onednn._DTYPES, torch.bfloat16, lambda: False)  # type: ignore[arg-type]
    monkeypatch.setattr(openvino, "_has_bfloat16", lambda: False)
    assert [rung.dropped for rung in run("auto", max_error=1e-2).rungs[2:]] == [
        "not built: oneDNN has no kernels for torch.bfloat16 here",
        "not built: OpenVINO has no kernels for bfloat16 on this CPU, and computes in float32 instead",
    ]


def test_a_model_that_has_fewer_bits_of_its_own_is_built_without_kernels_for_them(
    measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"cast": 1.0, ("eager", "cast"): 1.0, ("onednn", "cast"): 1.0}
    monkeypatch.setattr(candidates, "ON_CPU", HERE)
    monkeypatch.setitem(onednn._DTYPES, torch.bfloat16, lambda: False)  # type: ignore[arg-type]
    x = torch.randn(2, 4)
    mixed = nn.Sequential(nn.Linear(4, 4), Narrow(4, 4)).eval()
    module, inputs = fxopt.capture(mixed, (x,)).module, Inputs((x,))
    assert not climb("auto", module, module, inputs).rungs[1].dropped


def test_nothing_to_cast_is_said(measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch) -> None:
    measured["eager"] = 1.0
    monkeypatch.setattr(candidates, "ON_CPU", (HERE[0], CAST))
    module, inputs = fxopt.capture(nn.ReLU(), (torch.randn(2),)).module.eval(), Inputs((torch.randn(2),))
    found = climb("auto", module, module, inputs, max_error=1e-2)
    assert found.rungs[1].dropped.startswith("'cast{dtype=bf16}' changes nothing in the module")


@pytest.mark.parametrize(("passes", "tried"), [("clean", False), ("sparsify", True), ("sparsify,sparsify-bake", True)])
def test_sparse_kernels_are_tried_where_there_are_zeros(
    passes: str, tried: bool, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "sparse": 0.9}
    monkeypatch.setattr(candidates, "ON_CPU", (HERE[0], Rung("sparse")))
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    passes = passes.replace("sparsify", "sparsify{amount=0.9}", 1)
    result = fxopt.optimize(model, x, passes, engine="all", devices=())
    assert result.record["engines"] is not None
    assert [rung["engine"] for rung in result.record["engines"]["rungs"]] == ["eager"] + ["sparse"] * tried


@pytest.mark.parametrize("holds", [True, False])
def test_builds_stop_when_the_budget_is_short_and_there_is_something_to_choose(
    holds: bool, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    monkeypatch.setattr(candidates, "ON_CPU", (Rung("eager"), Rung("onednn", {"tune_seconds": 0.0}), Rung("onednn")))
    wrong = OneDNN(0.0)
    monkeypatch.setattr(Builder, "_errors", lambda _, e, *__: [(0.0 if holds or e.engine != wrong else 1.0, 1e-4, 0)])
    _, first, second = run("auto", budget_seconds=1e-9).rungs
    assert bool(first.dropped) is not holds
    assert second.dropped == ("not built: the budget of 1e-09 s was short" if holds else "")


def test_an_unknown_engine_is_refused_before_anything_runs() -> None:
    def evaluate(_: nn.Module) -> Any:
        raise AssertionError("it ran")

    with pytest.raises(EngineError, match="did you mean 'onednn'"):
        fxopt.optimize(CASE.build(), CASE.example(), "fuse", engine="onedn", evaluate=evaluate)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_bound_that_nothing_can_hold_is_refused(bad: float) -> None:
    with pytest.raises(SpecError, match="max_error: expected 0 or more, not"):
        fxopt.optimize(CASE.build(), CASE.example(), "fuse", engine="auto", max_error=bad)


def test_a_module_that_trains_has_no_engine(measured: dict[Any, float]) -> None:
    with pytest.raises(EngineError, match=r"in training mode; call .eval"):
        fxopt.optimize(CASE.build().train(), CASE.example(), "fuse", engine="auto", devices=())


def test_the_choice_is_kept_and_made_again_without_measuring(
    tmp_path: Path, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    model, x = CASE.build(), CASE.example()[0]
    result = fxopt.optimize(model, x, "clean,fuse", engine="auto", devices=())
    assert result.executable is not None
    save(result, tmp_path / "out", {})
    monkeypatch.setattr("fxopt.engines.onednn.choose", lambda *_: pytest.fail("it measured"))
    loaded = fxopt.load(tmp_path / "out", model)
    assert isinstance(loaded, Executable)
    assert loaded.choices == result.executable.choices
    assert_agree(loaded(x), result.executable(x), 0)


def test_the_error_that_was_allowed_is_kept(
    tmp_path: Path, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    model, x = CASE.build(), CASE.example()[0]
    save(fxopt.optimize(model, x, "fuse", engine="onednn", max_error=0.2, devices=()), tmp_path / "out", {})
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    recipe["engine"] |= {"name": "openvino", "options": {"precision": "mixed"}}
    (tmp_path / "out" / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(sys.modules["fxopt.artifact.load"], "build", lambda engine, *_: engine)
    assert fxopt.load(tmp_path / "out", model) == OpenVINO(precision="mixed", max_error=0.2)


def test_the_record_tells_all_of_it(measured: dict[Any, float]) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    result = fxopt.optimize(CASE.build(), CASE.example(), "fuse", engine="auto", max_error=1e-3, devices=())
    jsonschema.validate(result.record, record.schema())
    text = report.render(result.record)
    assert "onednn *" in text
    assert "1.67x faster [1.63, 1.70]" in text
    written = result.record["engines"]
    assert written is not None
    assert (written["asked"], written["chosen"], written["max_error"]) == ("auto", 1, 1e-3)


def test_engines_are_really_measured() -> None:
    found = run("onednn", budget_seconds=1.0)
    assert found.chosen is not None
    assert found.chosen.comparison is not None
    assert found.chosen.comparison.pairs > 0
    assert found.seconds > 0


def test_a_quantised_module_may_round_otherwise_than_the_oracle() -> None:
    model, example = CASE.build(), CASE.example()
    assert fxopt.lower(model, example, "eager").rounding == 0.0
    quantised = fxopt.optimize(model, example, [QAT()], devices=()).module
    assert fxopt.lower(quantised, example, "eager").rounding > TOLERANCE[torch.float32]


def test_a_quantised_module_may_round_its_example_to_zeros() -> None:
    model = nn.Linear(4, 4, bias=False).eval()
    wide: Any = {"devices": (), "calibration_data": [torch.full((2, 4), 1e6)]}
    quantised = fxopt.optimize(model, torch.ones(2, 4), "ptq{correct=false},quantize-freeze", **wide).module
    assert not quantised(torch.ones(2, 4)).any()
    assert fxopt.lower(quantised, torch.ones(2, 4), "onnxruntime").rounding > 0


@pytest.fixture
def build_seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How long it takes to build an engine, by its name; nothing else takes any time."""
    seconds: dict[str, float] = {}
    now, real = [0.0], builder.build

    def build(engine: Any, *rest: Any) -> Executable:
        now[0] += seconds.get(engine.name, 0.0)
        return real(engine, *rest)

    monkeypatch.setattr(ladder, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(builder, "build", build)
    return seconds


def test_what_compiles_is_begun_early_or_not_at_all(
    measured: dict[Any, float], build_seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6, ("onednn", "onednn"): 1.0}
    monkeypatch.setattr(candidates, "ON_CPU", (Rung("eager"), Rung("onednn", compiles=True), Rung("onednn")))
    build_seconds["eager"] = 20
    assert [rung.dropped for rung in run("auto", budget_seconds=60).rungs] == [
        "",
        "not built: the budget of 60 s was short",
        "",
    ]
    build_seconds["eager"] = 10
    assert not any(rung.dropped for rung in run("auto", budget_seconds=60).rungs)


@pytest.mark.parametrize(("max_error", "needs_one"), [(None, True), (5e-4, False)])
def test_tf32_needs_a_bound_and_may_hold_one_that_bfloat16_cannot(
    max_error: float | None, needs_one: bool, measured: dict[Any, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0}
    monkeypatch.setattr(candidates, "ON_CPU", (HERE[0], Rung("cudnn", {"tf32": True})))
    dropped = run("auto", max_error=max_error).rungs[1].dropped
    assert ("fewer bits need a bound" in dropped) is needs_one
    assert needs_one or "CUDA" in dropped or "cuda" in dropped


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("max_error", "first"), [(None, "openvino"), (1e-2, "openvino{precision=bf16}")])
def test_a_budget_that_is_short_goes_to_what_wins_most_often(
    max_error: float | None,
    first: str,
    measured: dict[Any, float],
    build_seconds: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs("openvino")
    measured |= {"eager": 1.0, "openvino": 0.4}
    monkeypatch.setattr(candidates, "ON_CPU", ALL_RUNGS)
    build_seconds["openvino"] = 60
    rungs = run("auto", max_error=max_error, budget_seconds=60).rungs
    assert [rung.label for rung in rungs if rung.executable is not None] == ["eager", first]


def test_builds_that_take_too_long_leave_time_to_measure(
    measured: dict[Any, float], build_seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured |= {"eager": 1.0, "onednn": 0.6}
    given = []
    together = ladder._together
    monkeypatch.setattr(ladder, "_together", lambda *how: (given.append(how[4]), together(*how))[1])
    build_seconds |= {"eager": 1, "onednn": 200}
    run("auto", budget_seconds=60)
    assert given == [pytest.approx(18)], "three quarters of 24 s, and none of the rest where one is clearly ahead"
    measured |= {"onednn": 0.99, ("onednn", "eager"): 1.0}
    run("auto", budget_seconds=60)
    assert given[1:] == [pytest.approx(18), pytest.approx(24)], "the clock stands still"
    monkeypatch.setattr(ladder, "_SHORTEST_MEASUREMENT", 25)
    assert getattr(run("auto", budget_seconds=60).chosen, "engine", None) == "onednn"
    assert given[3:] == [pytest.approx(18)], "nor where nothing is left"
