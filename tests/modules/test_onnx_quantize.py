"""What is frozen here runs in onnxruntime as integers, with the outputs of the simulation."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.modules import for_onnx
from passes import QAT, Fuse, QuantizeFreeze
from passes.qat import calibrate
from tests.passes.programs import captured, rewrite


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.right(x) + x)
        return self.head(self.pool(x).flatten(1))


def frozen(**options: object) -> tuple[GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    program = captured(Residual().eval(), (x,))
    rewrite(Fuse(), program)
    rewrite(QAT(**options), program)  # type: ignore[arg-type]
    calibrate(program, [x])
    rewrite(QuantizeFreeze(), program)
    return program, x


def exported(program: GraphModule, x: torch.Tensor, path: Path) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        made = torch.onnx.export(
            for_onnx(program), (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        )
    assert made is not None
    made.save(path)
    return onnx.load(path)


def deployed(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    return found


@pytest.mark.parametrize(
    "options",
    [{"target": "onnxruntime"}, {"weights": "int4", "activations": "int8"}, {"activations": "uint4"}],
    ids=str,
)
def test_the_deployed_model_gives_what_the_simulation_gives(tmp_path: Path, options: dict[str, object]) -> None:
    program, x = frozen(**options)
    model = exported(program, x, tmp_path / "model.onnx")
    weights = {t.name: t for t in model.graph.initializer if "stored" in t.name or t.data_type == onnx.TensorProto.INT8}
    assert sum(len(t.dims) > 1 for t in weights.values()) == 3
    assert not any(t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 for t in model.graph.initializer)
    other = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        simulated = program(other).numpy()
    # A sum that falls between two steps may be rounded either way.
    step = np.abs(simulated).max() / 25
    assert np.abs(deployed(tmp_path / "model.onnx", other) - simulated).max() < step


def test_the_placement_for_onnxruntime_leaves_no_float_convolution(tmp_path: Path) -> None:
    program, x = frozen(target="onnxruntime")
    exported(program, x, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["QLinearConv"] == 2
    assert counts["QLinearAdd"] == 1
    assert not counts["Conv"] and not counts["FusedConv"]


def test_a_quantiser_without_a_range_is_named() -> None:
    program = captured(Residual().eval(), (torch.randn(1, 3, 8, 8),))
    rewrite(QAT(), program)
    with pytest.raises(EngineError, match=r"'input_fake_quant\.stem' never observed anything"):
        for_onnx(program)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = F.relu(self.body(x))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_what_training_alone_calls_needs_no_range() -> None:
    x = torch.randn(3, 4)
    module = fxopt.optimize(Auxiliary().eval(), x, "qat,quantize-freeze", devices=(), calibration_data=[x]).module
    torch.testing.assert_close(fxopt.lower(module, x, engine="onnxruntime")(x), module(x))
    assert len(module.train()(x)) == 2


def test_a_batch_norm_that_trains_has_to_be_folded_first() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), (torch.randn(2, 3, 8, 8),))
    rewrite(Fuse(), program)
    rewrite(QAT(activations="none"), program)
    with pytest.raises(EngineError, match="'0' still holds its batch norm: run 'quantize-freeze'"):
        for_onnx(program)


def test_what_is_too_wide_for_integer_kernels_is_named() -> None:
    program, _ = frozen(activations="uint16")
    with pytest.raises(EngineError, match=r"'input_fake_quant\.stem' has 16 bits"):
        for_onnx(program)
