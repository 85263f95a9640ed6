"""The Python entry: `fxopt.optimize`."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import torch
from torch import nn

import fxopt
from fxopt import record
from fxopt.artifact import save
from fxopt.engines.candidates import placed_for
from fxopt.errors import LoadError, SpecError
from fxopt.pipeline import aimed_at
from passes import QAT, Fuse
from tests import models
from tests.capture.odd import ODD

CASE = models.STATIC["conv_block"]


def test_passes_may_be_objects_or_a_spec() -> None:
    module, inputs = CASE.build(), CASE.example()
    by_objects = fxopt.optimize(module, inputs, passes=[Fuse(), QAT(bits=6)], devices=())
    by_spec = fxopt.optimize(module, inputs, passes="fuse,qat{bits=6}", devices=())
    drawn = fxopt.optimize(module, inputs, passes=iter(by_spec.passes), devices=())  # type: ignore[arg-type]
    assert by_objects.passes == by_spec.passes == drawn.passes
    with torch.no_grad():
        assert torch.equal(by_objects.module(*inputs), by_spec.module(*inputs))


def test_the_module_passed_in_and_the_random_state_are_unchanged() -> None:
    module, inputs = CASE.build().train(), CASE.example()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    result = fxopt.optimize(module, inputs, passes="fuse,qat", devices=())
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Locked(nn.Module):
    """Opaque, with an attribute that can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            return self.layer(x) if x.sum().item() > 0 else self.layer(x) * 2


class Computed(nn.Module):
    """With attributes that were computed from a parameter, which is in their history."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.doubled = self.layer.weight * 2
        self.rows = {"first": [self.layer.weight[0]]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.doubled + self.rows["first"][0]


@pytest.mark.parametrize("build", [Locked, Computed])
def test_a_module_that_copy_refuses(build: type[nn.Module]) -> None:
    module, x = build().eval(), torch.rand(2, 4)
    result = fxopt.optimize(module, x, passes="clean,sparsify{amount=0.5,granularity=row}", devices=())
    assert torch.equal(fxopt.optimize(module, x, passes="clean", devices=()).module(x), module(x))
    result.module.train()(x).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_leaves_each_part_in_its_own_mode(training: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(), nn.Tanh())).train(training)
    module[1].train(not training)
    module[2][0].train(not training)
    modes = [child.training for child in module.modules()]

    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"sum": module.eval()(torch.ones(2, 4)).sum().item()}

    result = fxopt.optimize(module, torch.randn(2, 4), passes=[], evaluate=evaluate, devices=())
    assert [child.training for child in module.modules()] == modes
    assert [child.training for child in result.module.modules()] == modes


@pytest.mark.parametrize("name", ["tensor", "tuple", "dict"])
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(name: str) -> None:
    x = torch.linspace(0, 1, 6).reshape(2, 3)
    inputs = {"tensor": x, "tuple": (x,), "dict": {"input": x}}[name]
    result = fxopt.optimize(nn.Linear(3, 3).eval(), inputs, passes=[], devices=())
    assert result.record["inputs"] == ("input=2x3 float32" if name == "dict" else "2x3 float32")


def test_the_record_follows_the_schema_and_tells_of_each_change_with_its_line() -> None:
    result = fxopt.optimize(
        CASE.build(),
        CASE.example(),
        passes="fuse",
        budget_seconds=0.3,
        evaluate=lambda module: {"size": sum(p.numel() for p in module.parameters())},
        devices=("cpu", "cuda"),
    )
    written = json.loads(json.dumps(result.record))
    jsonschema.validate(written, record.schema())
    assert set(written) == {
        *(
            "schema",
            "target",
            "inputs",
            "machine",
            "capture",
            "passes",
            "verified",
            "uncompared",
            "latency",
            "memory",
            "metrics",
            "engines",
        )
    }
    assert written["passes"][0]["changes"][0]["source"].startswith("models.py:")
    assert written["metrics"]["after"]["size"] < written["metrics"]["before"]["size"]
    if not torch.cuda.is_available():
        assert written["latency"]["cuda"] == {"not_measured": "no CUDA device"}


def test_calibration_data_reaches_the_pass_that_needs_it() -> None:
    def batches() -> Iterator[torch.Tensor]:
        yield from (torch.randn(2, *CASE.example()[0].shape[1:]) for _ in range(3))

    result = fxopt.optimize(CASE.build(), CASE.example(), passes="fuse,qat", calibration_data=batches, devices=())
    assert any(change.what.startswith("calibrated on 3 batches") for change in result.ledger.changes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"passes": "fuze"}, SpecError, "unknown pass 'fuze'"),
        ({"passes": [Fuse]}, SpecError, r"passes: expected a list of passes, such as \[Fuse\(\), .*, not <class"),
        ({"passes": Fuse()}, SpecError, r"passes: expected .*, not Fuse\("),
        ({"passes": "qat,fuse", "progress": pytest.fail}, SpecError, "'qat' must come after 'fuse'"),
        ({"passes": "fuse", "calibration_data": [3]}, LoadError, "expected a tensor"),
        ({"passes": "fuse", "evaluate": lambda module: 3}, LoadError, r"evaluate\(module\) raises"),
        ({"passes": "fuse", "inputs": torch.ones(1, 1, 1)}, LoadError, "the model itself raises"),
        ({"passes": "fuse", "inputs": 3}, LoadError, "inputs: expected a tensor"),
    ],
)
def test_wrong_arguments_are_refused_with_a_reason(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    given = {"inputs": CASE.example(), "devices": (), **arguments}
    with pytest.raises(error, match=message):
        fxopt.optimize(CASE.build(), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "target", "placed"),
    [
        ("onnxruntime", "auto", "onnxruntime"),
        ("openvino{precision=bf16}", "auto", "openvino"),
        ("onnxruntime", "generic", "generic"),
        ("onnxruntime", "openvino", "openvino"),
        ("onednn", "auto", "auto"),
        ("all", "auto", "auto"),
        (None, "auto", "auto"),
    ],
)
def test_quantisers_are_placed_for_the_engine_asked_for(engine: str | None, target: Any, placed: str) -> None:
    assert aimed_at(engine, [Fuse(), QAT(target=target)]) == (Fuse(), QAT(target=cast(Any, placed)))


@pytest.mark.parametrize(
    ("asked", "device", "engine"),
    [
        ("auto", "cpu", "onnxruntime"),
        ("all", "cpu", "onnxruntime"),
        ("auto", "cuda", "auto"),
        ("openvino{precision=bf16}", "cpu", "openvino{precision=bf16}"),
    ],
)
def test_of_several_engines_on_a_cpu_quantisers_are_placed_for_the_one_that_asks_most(
    asked: str, device: str, engine: str
) -> None:
    assert placed_for(asked, torch.device(device)) == engine


def test_what_an_engine_gave_as_the_target_is_kept(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    given: Any = {"engine": "onnxruntime", "engine_seconds": 0.1, "devices": (), "calibration_data": [x]}
    result = fxopt.optimize(model, x, "fuse,ptq,quantize-freeze", **given)
    assert result.executable is not None
    assert "operators on integers: 1 QLinearConv" in {skip.reason for skip in result.executable.reasons}
    assert repr(result).startswith("Result(Sequential; changes: fuse 1, ptq 5, quantize-freeze 4; run by onnxruntime; ")
    save(result, tmp_path / "out")
    assert "ptq{target=onnxruntime}" in (tmp_path / "out" / "recipe.json").read_text()


def test_a_saved_result_loads_to_equal_outputs(tmp_path: Path) -> None:
    module, inputs = CASE.build(), CASE.example()
    result = fxopt.optimize(module, inputs, passes="clean,fuse,qat", calibration_data=[inputs], devices=())
    save(result, str(tmp_path / "out"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
        assert torch.equal(fxopt.load(tmp_path / "out", module)(*inputs), result.module(*inputs))


INSIDE = {
    "capture": lambda module, x: fxopt.capture(module, x).module,
    "optimize": lambda module, x: fxopt.optimize(module, x, "clean,fuse", devices=()).module,
    "lower": lambda module, x: fxopt.lower(module, x),
    "compare": lambda module, x: fxopt.compare(module, module, x, pairs=1) and module,
}


@pytest.mark.parametrize("name", INSIDE)
def test_all_of_it_may_be_called_in_inference_mode(name: str) -> None:
    module, (x,) = CASE.build(), CASE.example()
    with torch.inference_mode():
        own = x * 1
        found = INSIDE[name](module, own)
        inside = found(own)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(inside, module(x).detach())
    with torch.no_grad():
        torch.testing.assert_close(found(x), inside)


@pytest.mark.parametrize("engine", ["eager", "onednn", "onnxruntime"])
@pytest.mark.parametrize("case", [CASE, ODD["shape_cache"]])
def test_a_copy_that_is_made_in_inference_mode_runs(case: models.Case, engine: str) -> None:
    if case is not CASE and engine == "onnxruntime":
        pytest.skip("it exports no opaque part")
    module, (x,) = case.build(), case.example()
    module(x)
    executable = fxopt.lower(module, x, engine)
    with torch.inference_mode():
        copied = copy.deepcopy(executable)
    torch.testing.assert_close(copied(x), executable(x))
