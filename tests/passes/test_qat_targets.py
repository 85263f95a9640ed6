"""Which operators each target gets on integers, and what it leaves as floats, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import PassError
from fxopt.modules import FakeQuantize, quantized_weights
from passes import QAT, Fuse, QuantizeFreeze
from passes.qat import calibrate
from tests.models import STATIC
from tests.passes.programs import Outcome, assert_close, captured, rewrite, run

TOKENS = torch.randn(2, 6, 16)


class Calls(nn.Module):
    """A function of layers and an input."""

    def __init__(self, function: Callable[..., torch.Tensor], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class Sums(nn.Module):
    """Two products with a bias, by parameters that lie as GPT-2's do, and as those of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(8))
        self.columns = nn.Parameter(torch.randn(16, 8))
        self.rows = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.addmm(self.bias, x, self.columns), self.rows.t())


class ByHand(nn.Module):
    """Linear layers of one weight and bias, called as functions, with an activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.weight, self.bias).relu(), self.weight, self.bias)


class Decodes(nn.Module):
    """An autoencoder whose decoder is the encoder's weight transposed, with a bias that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(16, 8), nn.Parameter(torch.randn(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.encoder(x).relu(), self.encoder.weight.t(), 2 * self.bias)


def linear(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), **more}


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "product": (lambda: Calls(lambda m, x: m.a(x) @ m.b(x).transpose(1, 2), **linear()), TOKENS),
    "attention": (
        lambda: Calls(lambda m, x: m.b(F.scaled_dot_product_attention(*[m.a(x)[:, None]] * 3)[:, 0]), **linear()),
        TOKENS,
    ),
    "addmm": (lambda: Sums(), torch.randn(4, 16)),
    "function": (lambda: ByHand(), torch.randn(4, 16)),
    "decoder": (lambda: Decodes(), torch.randn(4, 16)),
    "reused": (lambda: Calls(lambda m, x: m.a(F.gelu(m.a(x))), a=nn.Linear(16, 16)), TOKENS),
    "recurrent": (lambda: Calls(lambda m, x: m.a(m.gru(x)[0]), **linear(gru=nn.GRU(16, 16))), TOKENS),
    "gelu": (lambda: Calls(lambda m, x: m.b(F.gelu(m.a(x))), **linear()), TOKENS),
    "norm": (lambda: Calls(lambda m, x: m.a(m.norm(x)), **linear(norm=nn.LayerNorm(16))), TOKENS),
    "transposed": (
        lambda: Calls(lambda m, x: m.b(m.a(x)), a=nn.Conv1d(6, 4, 1), b=nn.ConvTranspose1d(4, 2, 2)),
        TOKENS,
    ),
    "pools": (
        lambda: Calls(
            lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(F.relu(m.a(x)), 2), 2)),
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 4, 1),
        ),
        torch.randn(2, 3, 8, 8),
    ),
    "padded": (
        lambda: Calls(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
            a=nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            b=nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
            c=nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate"),
        ),
        torch.randn(2, 3, 8, 8),
    ),
    "cross": (
        lambda: Calls(
            lambda m, x: m.cross(x, x.flip(1), x.flip(1), need_weights=False)[0],
            cross=nn.MultiheadAttention(16, 2, batch_first=True),
        ),
        TOKENS,
    ),
}
PLACED: dict[tuple[str, str], tuple[list[str], str]] = {
    ("product", "generic"): (["a", "matmul", "matmul_1"], ""),
    ("product", "onnxruntime"): (["a", "matmul", "matmul_1"], ""),
    ("product", "openvino"): (["a"], "matmul: OpenVINO multiplies two computed values in floats"),
    ("product", "inductor"): (["a"], "matmul: TorchInductor multiplies two computed values in floats"),
    ("attention", "generic"): (["a", "b", "scaled_dot_product_attention"], ""),
    ("attention", "onnxruntime"): (["a", "b"], "onnxruntime scales queries and keys behind any quantiser"),
    ("attention", "openvino"): (["a", "b"], "OpenVINO multiplies two computed values in floats"),
    ("recurrent", "generic"): (["a", "gru"], ""),
    ("recurrent", "onnxruntime"): (["a"], "gru: onnxruntime runs recurrent layers in floats"),
    ("recurrent", "openvino"): (["a"], "gru: OpenVINO runs recurrent layers in floats"),
    ("gelu", "onnxruntime"): (["a", "b"], "gelu stays a float: onnxruntime has no integer kernel for it"),
    ("gelu", "openvino"): (["a", "b"], ""),
    ("norm", "openvino"): (["a"], "norm: LayerNorm stays a float: openvino has no integer kernel for it"),
    ("transposed", "generic"): (["a", "b"], ""),
    ("transposed", "inductor"): (["a"], "b: TorchInductor has no integer kernel for conv_transpose1d"),
    ("pools", "generic"): (["a", "b"], ""),
    ("pools", "openvino"): (["a", "avg_pool2d", "b"], ""),
}


def placed(name: str, target: str, weights: str = "") -> tuple[Outcome, torch.Tensor]:
    torch.manual_seed(0)
    build, x = MODELS[name]
    program = captured(build().eval(), (x,))
    rewrite(Fuse(), program)
    return rewrite(QAT(target=target, weights=weights), program), x  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "target"), PLACED)
def test_inputs_are_quantised_where_the_target_multiplies_integers(name: str, target: str) -> None:
    inputs, reason = PLACED[name, target]
    outcome, x = placed(name, target)
    module = outcome.module
    named = [each for each, child in module.named_modules() if isinstance(child, FakeQuantize)]
    assert sorted(each for each in named if each.startswith("input_fake_quant.")) == [
        f"input_fake_quant.{each}" for each in sorted(inputs)
    ]
    assert [text for text in outcome.reasons if reason in text] if reason else not outcome.reasons
    assert not calibrate(module, [(x,)])
    assert not rewrite(QAT(target=target), module).changes  # type: ignore[arg-type]


KERNELS: dict[tuple[str, str], tuple[str, str]] = {
    ("product", "onnxruntime"): ("3 MatMulIntegerToFloat", ""),
    ("product", "openvino"): ("2 FullyConnected", "MatMul runs in floats"),
    ("attention", "onnxruntime"): ("2 MatMulIntegerToFloat", "multiplies two computed values, not both of them"),
    ("attention", "openvino"): ("2 FullyConnected", ""),
    ("addmm", "onnxruntime"): ("2 MatMulIntegerToFloat", ""),
    ("function", "onnxruntime"): ("2 MatMulIntegerToFloat", ""),
    ("decoder", "onnxruntime"): ("2 MatMulIntegerToFloat", ""),
    ("decoder", "openvino"): ("none", "2 MatMul run in one kernel with what is around them"),
    ("decoder", "inductor"): ("2 qlinear", ""),
    ("reused", "onnxruntime"): ("2 MatMulIntegerToFloat", ""),
    ("reused", "openvino"): ("2 FullyConnected", ""),
    ("recurrent", "onnxruntime"): ("1 MatMulIntegerToFloat", "GRU runs in floats: onnxruntime has no integer kernel"),
    ("recurrent", "openvino"): ("1 FullyConnected", "RNNSeq runs in floats"),
    ("gelu", "openvino"): ("2 FullyConnected", ""),
    ("pools", "openvino"): ("2 Convolution, 2 Pooling", ""),
    ("padded", "onnxruntime"): (
        "2 QLinearConv",
        "Conv runs in floats: its input and weight are integers, but its output",
    ),
    ("cross", "onnxruntime"): ("4 MatMulIntegerToFloat", "multiplies two computed values, not both of them"),
    ("cross", "openvino"): ("4 FullyConnected", ""),
}


@pytest.mark.parametrize(("name", "target"), KERNELS)
def test_what_was_placed_for_a_runtime_becomes_its_integer_kernels(name: str, target: str) -> None:
    pytest.importorskip({"inductor": "torch"}.get(target, target))
    integers, left = KERNELS[name, target]
    outcome, x = placed(name, target, "int7")  # products of wider ones saturate on some CPUs
    calibrate(outcome.module, [(x,)])
    rewrite(QuantizeFreeze(), outcome.module)
    executable = fxopt.lower(outcome.module, x, engine=target)
    reasons = [skip.reason for skip in executable.reasons if "batch size" not in skip.reason]
    assert reasons[0] == f"operators on integers: {integers}"
    assert any(left in reason for reason in reasons[1:]) if left else not reasons[1:]
    with torch.no_grad():
        assert_close(executable(x), outcome.module(x), 1e-4)


@pytest.mark.parametrize("name", ["gelu", "reused", "addmm", "function", "padded", "cross"])
def test_a_file_for_onnxruntime_holds_nothing_that_is_not_read(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    outcome, x = placed(name, "onnxruntime", "int7")
    calibrate(outcome.module, [(x,)])
    rewrite(QuantizeFreeze(), outcome.module)
    fxopt.lower(outcome.module, x, engine="onnxruntime").save(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert not [constant.name for constant in graph.initializer if constant.name not in read]
    assert not [node.name for node in graph.node if not read.intersection(node.output)]


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "openvino", "inductor"])
def test_a_view_is_quantised_with_what_was_written_into_it(target: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            rows = y.flatten(1)
            y.relu_()
            return self.head(rows)

    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(2, 3, 8, 8)
    program = run(QAT(target=target), model, (x,)).module  # type: ignore[arg-type]
    calibrate(program, [x])
    assert_close(program(x), model(x), 0.02)


@pytest.mark.parametrize("values", [lambda k, x: k, lambda k, x: k.expand(len(x), -1, -1, -1)], ids=["one", "rows"])
def test_a_convolution_of_a_constant_reads_floats_in_openvino(values: Callable[..., torch.Tensor]) -> None:
    pytest.importorskip("openvino")

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.project = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 1)
            self.register_buffer("positions", torch.randn(1, 4, 8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.project(values(self.get_buffer("positions"), x))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    outcome = run(QAT(target="openvino", weights="int7"), Positions().eval(), (x,))
    calibrate(outcome.module, [x])
    rewrite(QuantizeFreeze(), outcome.module)
    assert any(reason.startswith("project: its input is a constant") for reason in outcome.reasons)
    with torch.no_grad():
        assert_close(fxopt.lower(outcome.module, x, engine="openvino")(x), outcome.module(x), 1e-4)


def test_openvino_gets_the_value_before_what_only_picks_from_it() -> None:
    outcome, _ = placed("pools", "openvino")
    calls = outcome.calls
    assert calls.index("input_fake_quant.avg_pool2d") < calls.index("max_pool2d") < calls.index("avg_pool2d")


@pytest.mark.parametrize("name", ["hand_linear", "scaled_linear"])
def test_a_parameter_is_quantised_along_its_outputs_before_it_is_transposed(name: str) -> None:
    case = STATIC[name]
    outcome = run(QAT(), case.build(), case.example())
    weights = [fake for each, fake in outcome.module.named_modules() if each.startswith("weight_fake_quant.")]
    assert [(fake.axis, fake.scale.shape) for fake in weights] == [(0, (8,))]  # type: ignore[union-attr]
    assert outcome.calls.index(next(c for c in outcome.calls if c.startswith("weight"))) == 0
    calibrate(outcome.module, [case.example()])
    simulated = outcome.module(*case.example())
    rewrite(QuantizeFreeze(), outcome.module)
    assert_close(outcome.module(*case.example()), simulated)


class Reads(nn.Module):
    """A parameter that a function reads."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.function(ids, self.table)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Reads(F.embedding), "embedding: the parameter that it reads stays a float: only an nn.Embedding has a form"),
        (Reads(F.embedding_bag), "embedding_bag: the parameter that it reads stays a float: there is no form of it"),
        (
            Reads(lambda ids, table: torch.einsum("bn,nm->bm", F.one_hot(ids, 9).float().mean(1), table)),
            "einsum: the parameter that it reads stays a float: only as a matrix product would it be quantised",
        ),
        (nn.Sequential(nn.EmbeddingBag(9, 4)), "0: its table stays a float: there is no form of it"),
    ],
    ids=["embedding", "embedding_bag", "einsum", "EmbeddingBag"],
)
def test_a_parameter_that_stays_a_float_is_told_of(model: nn.Module, reason: str) -> None:
    outcome = run(QAT(), model.eval(), (torch.randint(0, 9, (2, 5)),))
    assert not outcome.changes
    assert [text for text in outcome.reasons if text.startswith(reason)]


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Calls(lambda m, x: m.layer(x)[0], layer=nn.LSTM(16, 8)),
    "GRU": lambda: Calls(lambda m, x: m.layer(x)[0], layer=nn.GRU(16, 8)),
    "LSTMCell": lambda: Calls(lambda m, x: m.layer(x[0])[0], layer=nn.LSTMCell(16, 8)),
    "GRUCell": lambda: Calls(lambda m, x: m.layer(x[0], m.layer(x[1])), layer=nn.GRUCell(16, 8)),
}


class Tables(nn.Module):
    """A table and a bias, each added to what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.positions = nn.Parameter(torch.randn(1, 6, 16))
        self.shift = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.positions + x) + self.shift


@pytest.mark.parametrize("target", ["generic", "onnxruntime", "openvino", "inductor"])
def test_a_table_that_is_added_is_quantised_row_by_row_where_a_file_holds_its_integers(target: str) -> None:
    torch.manual_seed(0)
    outcome = run(QAT(target=target), Tables().eval(), (TOKENS,))  # type: ignore[arg-type]
    named = [(each, fake) for each, fake in outcome.module.named_modules() if isinstance(fake, FakeQuantize)]
    tables = [(each, fake.axis, fake.scale.shape) for each, fake in named if each.startswith("weight_fake_quant.")]
    assert tables == ([] if target == "inductor" else [("weight_fake_quant.positions", 1, (6,))])
    assert not rewrite(QAT(target=target), outcome.module).changes  # type: ignore[arg-type]


def test_a_table_that_is_written_into_is_none() -> None:
    class Writes(Tables):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.positions.add_(x[:1]))

    outcome = run(QAT(), Writes().eval().requires_grad_(False), (TOKENS,))
    assert not [name for name, _ in outcome.module.named_modules() if name.startswith("weight_fake_quant.")]


def test_a_table_lies_in_the_file_as_integers(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    outcome = run(QAT(target="onnxruntime"), Tables().eval(), (TOKENS,))
    calibrate(outcome.module, [(TOKENS,)])
    rewrite(QuantizeFreeze(), outcome.module)
    executable = fxopt.lower(outcome.module, TOKENS, engine="onnxruntime")
    with torch.no_grad():
        assert_close(executable(TOKENS), outcome.module(TOKENS), 1e-4)
    executable.save(tmp_path / "model")
    (file,) = (tmp_path / "model").rglob("model.onnx")
    dtypes = {tuple(tensor.dims): tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert dtypes[1, 6, 16] == onnx.TensorProto.INT8
    assert dtypes[1, 1, 16] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("kind", RECURRENT)
def test_weights_of_recurrent_layers_lie_in_the_file_as_integers(kind: str, freeze: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    outcome = run(QAT(target="onnxruntime"), RECURRENT[kind]().eval(), (TOKENS,))
    calibrate(outcome.module, [(TOKENS,)])
    if freeze:
        rewrite(QuantizeFreeze(), outcome.module)
    executable = fxopt.lower(outcome.module, TOKENS, engine="onnxruntime")
    with torch.no_grad():
        assert_close(executable(TOKENS), outcome.module(TOKENS), 1e-5)
    executable.save(tmp_path)
    held = onnx.load(tmp_path / "model.onnx").graph.initializer
    gates = [tensor.data_type for tensor in held if len(tensor.dims) > 1 and tensor.dims[-2] >= 3 * 8]
    assert gates == [onnx.TensorProto.INT8] * 2


def test_each_layer_of_a_transformer_can_be_left_out_by_name() -> None:
    case = STATIC["encoder"]
    outcome = run(QAT(include="encoder.layers.0.*", exclude="*linear2"), case.build(), case.example())
    assert [change.where for change in outcome.changes] == ["encoder.layers.0.self_attn", "encoder.layers.0.linear1"]


@pytest.mark.parametrize(
    ("options", "near"),
    [
        ("include=encoder.layer.0.linear1", "matches no layer; the nearest names are 'encoder.layers.0.linear1'"),
        ("include=encoder", "'encoder' matches no layer; the nearest names are 'encoder.layers"),
        (
            "include=encoder.*,exclude=*.*",
            r"include='encoder.\*' without exclude='\*.\*' matches no layer; the nearest",
        ),
    ],
)
@pytest.mark.parametrize("name", ["qat", "ptq"])
def test_a_name_that_no_layer_has_is_refused_with_those_that_there_are(name: str, options: str, near: str) -> None:
    case = STATIC["encoder"]
    with pytest.raises(PassError, match=f"{name}: .*{near}"):
        fxopt.optimize(
            case.build(), case.example(), f"{name}{{{options}}}", devices=(), calibration_data=[case.example()]
        )


@pytest.mark.parametrize("name", ["recurrent", "attention", "encoder", "tied_head"])
def test_forms_that_are_called_as_one_freeze(name: str) -> None:
    case = STATIC[name]
    program = captured(case.build(), case.example())
    rewrite(QAT(learned="lsq"), program)
    calibrate(program, [case.example()])
    simulated = program(*case.example())
    outcome = rewrite(QuantizeFreeze(), program)
    assert_close(program(*case.example()), simulated)
    assert not outcome.skips
    for _, owner, leaf, fake in quantized_weights(program):
        assert not isinstance(fake.scale, nn.Parameter)
        assert_close(fake(owner.get_parameter(leaf)), owner.get_parameter(leaf), 1e-6)
    assert not rewrite(QuantizeFreeze(), program).changes
    optimised = fxopt.optimize(case.build(), case.example(), [QAT()], devices=(), calibration_data=[case.example()])
    assert optimised.ledger.changes
