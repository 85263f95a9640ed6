"""Integer products that a CPU without VNNI saturates: avoided or told of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.engines import onnxruntime, saturation
from fxopt.engines.saturation import AVOIDED, SATURATES, adds_in_16_bits, saturates
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from passes import PTQ, QuantizeFreeze
from tests.engines.test_others import needs

ENGINES = ("onnxruntime", "openvino", "inductor")


@pytest.fixture
def without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "adds_in_16_bits", lambda flags: True)


class Largest(nn.Module):
    """Three layers in which nearly all products are the largest that there are, and zero points that are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        for parameter in self.layers.parameters():
            nn.init.constant_(parameter, 1 / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layers(x))


def frozen(target: str, weights: str = "", per_channel: bool = True) -> tuple[GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(4, 64) / 8 + 7 / 8
    ptq = PTQ(target=target, weights=weights, equalize=False, per_channel=per_channel)  # type: ignore[arg-type]
    return fxopt.optimize(Largest().eval(), x, [ptq, QuantizeFreeze()], devices=(), calibration_data=[x]).module, x


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("sse4_2", "avx", "avx2", "fma"), True),
        (("sse4_2", "avx2", "avx512f", "avx512bw"), True),
        (("sse4_2", "avx2", "avx_vnni"), False),
        (("sse4_2", "avx2", "avx512f", "avx512_vnni"), False),
        (("neon", "asimddp"), False),
        ((), False),
    ],
)
def test_a_cpu_of_x86_without_vnni_adds_in_16_bits(flags: tuple[str, ...], found: bool) -> None:
    assert adds_in_16_bits(flags) is found


@pytest.mark.usefixtures("without_vnni")
def test_only_weights_of_8_bits_saturate() -> None:
    assert saturates(frozen("onnxruntime")[0])
    assert saturates(frozen("onnxruntime", per_channel=False)[0])
    assert not saturates(frozen("onnxruntime", "int7")[0])
    assert not saturates(Largest())


@pytest.mark.parametrize("target", ENGINES)
def test_the_largest_products_of_7_bits_are_exact_on_any_cpu(target: str) -> None:
    needs(target)
    module, x = frozen(target, "int7")
    executable = fxopt.lower(module, x, target)
    assert {SATURATES, AVOIDED}.isdisjoint(executable.reasons)
    with torch.no_grad():
        torch.testing.assert_close(executable(x), module(x), rtol=1e-4, atol=0)


def test_the_largest_products_are_exact_in_onnxruntime_on_any_cpu() -> None:
    needs("onnxruntime")
    module, x = frozen("onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(fxopt.lower(module, x, "onnxruntime")(x), module(x), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize(("target", "reason"), [("onnxruntime", AVOIDED), ("openvino", SATURATES)])
def test_an_engine_tells_what_this_cpu_cannot(
    target: str, reason: fxopt.contract.Skip, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(target)
    module, x = frozen(target)
    monkeypatch.setattr(sys.modules["fxopt.engines.checked"], "relative_error", lambda want, got: 0.0)
    assert fxopt.lower(module, x, target).reasons[-1] == reason


@pytest.mark.usefixtures("without_vnni")
def test_weights_that_several_operators_read_are_made_unsigned_too(tmp_path: Path) -> None:
    needs("onnxruntime")
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 8, 1), torch.rand(2, 8, 4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer).eval()
    passes = [PTQ(target="onnxruntime"), QuantizeFreeze()]
    module = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module
    executable = fxopt.lower(module, x, "onnxruntime")
    assert executable.reasons[0].reason == "operators on integers: 2 QLinearConv"
    assert executable.reasons[-1] == AVOIDED
    executable.save(tmp_path)
    with torch.no_grad():
        for found in (executable(x), in_unsigned(tmp_path / "model.onnx", x)):
            torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-5)


def in_unsigned(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What a saved file gives with weights as unsigned bytes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.usefixtures("without_vnni")
def test_a_refusal_tells_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("openvino")
    module, x = frozen("openvino")
    monkeypatch.setattr(sys.modules["fxopt.engines.checked"], "relative_error", lambda want, got: 0.7)
    with pytest.raises(EngineError, match=r"differs from that of the module by 7.0e-01 .* `weights=int7`"):
        fxopt.lower(module, x, "openvino")


def test_each_weight_of_a_saved_file_has_a_zero_point_of_its_own(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    needs("onnxruntime")
    module, x = frozen("onnxruntime")
    fxopt.lower(module, x, "onnxruntime").save(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    held = {tensor.name for tensor in graph.initializer}
    zeros = [node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in held]
    assert len(zeros) == len({*zeros}) == 3


@pytest.mark.usefixtures("without_vnni")
def test_onnxruntime_tells_of_weights_that_it_cannot_make_unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnxruntime")
    module, x = frozen("onnxruntime")
    opened = onnxruntime._session

    def refusing(path: Path, optimized: Path | None, unsigned: bool = False) -> Any:
        if unsigned:
            raise RuntimeError("Attempt to replace the existing tensor")
        return opened(path, optimized)

    monkeypatch.setattr(onnxruntime, "_session", refusing)
    monkeypatch.setattr(sys.modules["fxopt.engines.checked"], "relative_error", lambda want, got: 0.0)
    assert fxopt.lower(module, x, "onnxruntime").reasons[-1] == SATURATES
