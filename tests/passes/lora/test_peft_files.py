"""Files, both ways: what PEFT saves and fxopt loads, and what fxopt saves and PEFT loads, gives equal outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxopt import capture
from fxopt.errors import ArtifactError
from passes import LoRA
from passes.lora import load_adapter, merge, save_adapter, set_adapter, unmerge, weighted
from passes.lora.inject import inject
from tests.passes.lora.conftest import randomize
from tests.passes.lora.small import MHA, MLP, ConvNet, EmbConv1D, Gated, Mixture, MLPOnParameters, Tied, floats, ints
from tests.passes.lora.test_inject import CASES as ADAPTED

ROUNDINGS = 8
"""Sums of products taken in another order differ by that much. On most processors there is no difference at all."""


def rounding(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in roundings of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max() / torch.finfo(expected.dtype).eps).item()


class Twice(MLP):
    """The layer behind the one whose weight is adapted as a whole has an adapter too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(x))


def transformers_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return EmbConv1D(Conv1D)


BUILD: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "mlp": (MLP, floats(9, 10)),
    "embedding": (transformers_conv1d, ints(4, 10, high=100)),
    "conv1d": (lambda: ConvNet(1, 1, 1, 2, hidden=9), floats(3, 1, 10)),
    "conv2d": (lambda: ConvNet(2, 5, 10, 3, hidden=640), floats(2, 5, 10, 10)),
    "groups": (lambda: ConvNet(2, 5, 5, 3, groups=5, hidden=45), floats(2, 5, 5, 5)),
    "groups2": (lambda: ConvNet(2, 16, 32, 3, groups=2, padding=1, hidden=512), floats(2, 16, 4, 4)),
    "conv3d": (lambda: ConvNet(3, 5, 10, 3, hidden=270), floats(2, 5, 5, 5, 5)),
    "conv3d1x1": (lambda: ConvNet(3, 1, 1, 1, hidden=27), floats(2, 1, 3, 3, 3)),
    "twice": (Twice, floats(9, 10)),
    "mha": (MHA, floats(4, 3, 10)),
    "parameters": (MLPOnParameters, floats(9, 10)),
    "experts": (lambda: nn.Sequential(Mixture(False), Mixture(True)), floats(5, 8)),
    "gated": (lambda: nn.Sequential(Gated(), nn.Sequential(Gated())), floats(9, 8)),
}
DORA = {"use_dora": True}
BIAS = {"lora_bias": True, "lora_alpha": 32}

# The configurations that PEFT's own tests of custom models run LoRA with; the models are written anew.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mlp 1", "mlp", {"target_modules": "lin0"}),
    ("mlp 2", "mlp", {"target_modules": ["lin0"]}),
    ("mlp 3", "mlp", {"target_modules": ["lin1"]}),
    ("mlp 4", "mlp", {"target_modules": ["lin0", "lin1"]}),
    ("mlp 5", "mlp", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("saved targets", "mlp", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("mlp 6", "mlp", {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1}),
    ("mlp 7 dora", "mlp", {"target_modules": ["lin0"], **DORA}),
    ("mlp 8 dora", "mlp", {"target_modules": ["lin0", "lin1"], **DORA}),
    ("mlp 9 dora", "mlp", {"target_modules": "lin1", **DORA, "lora_alpha": 32}),
    ("embedding 1", "embedding", {"target_modules": ["conv1d"]}),
    ("embedding 2", "embedding", {"target_modules": ["emb"]}),
    ("embedding 3", "embedding", {"target_modules": ["emb", "conv1d"]}),
    ("embedding 1 dora", "embedding", {"target_modules": ["conv1d"], **DORA}),
    ("embedding 2 dora", "embedding", {"target_modules": ["emb"], **DORA}),
    ("embedding 3 dora", "embedding", {"target_modules": ["emb", "conv1d"], **DORA}),
    ("conv1d", "conv1d", {"target_modules": ["conv1d"]}),
    ("conv1d dora", "conv1d", {"target_modules": ["conv1d"], **DORA}),
    ("conv2d 1", "conv2d", {"target_modules": ["conv2d"]}),
    ("conv2d 2", "conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("conv2d 1 dora", "conv2d", {"target_modules": ["conv2d"], **DORA}),
    ("conv2d 2 dora", "conv2d", {"target_modules": ["conv2d", "lin0"], **DORA}),
    ("groups", "groups", {"target_modules": ["conv2d"], "r": 5}),
    ("groups2", "groups2", {"target_modules": ["conv2d"]}),
    ("conv3d 1", "conv3d", {"target_modules": ["conv3d"]}),
    ("conv3d 2", "conv3d", {"target_modules": ["conv3d", "lin0"]}),
    ("conv3d 1 dora", "conv3d", {"target_modules": ["conv3d"], **DORA}),
    ("conv3d 2 dora", "conv3d", {"target_modules": ["conv3d", "lin0"], **DORA}),
    ("conv3d 1x1", "conv3d1x1", {"target_modules": ["conv3d"]}),
    ("conv3d 1x1 dora", "conv3d1x1", {"target_modules": ["conv3d"], **DORA}),
    ("mlp bias", "mlp", {"target_modules": ["lin0", "lin1"], **BIAS}),
    ("conv2d bias", "conv2d", {"target_modules": ["conv2d"], **BIAS}),
    ("conv3d bias", "conv3d", {"target_modules": ["conv3d"], **BIAS}),
    ("biases 1", "mlp", {"target_modules": ["lin0"], "bias": "all"}),
    ("biases 2", "mlp", {"target_modules": ["lin0"], "bias": "lora_only"}),
    ("mha 1", "mha", {"target_modules": ["mha"]}),
    ("mha 2", "mha", {"target_modules": ["mha", "lin0"]}),
    ("mha 3", "mha", {"target_modules": ["mha"], "rank_pattern": {"mha": 3}, "alpha_pattern": {"mha": 20}}),
    ("parameters 1", "parameters", {"target_modules": [], "target_parameters": ["lin0.weight"]}),
    ("parameters 2", "mlp", {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]}),
    ("parameters 3", "twice", {"target_modules": ["lin1"], "target_parameters": ["lin0.weight"]}),
    ("parameters 4", "gated", {"target_modules": [], "target_parameters": ["0.up", "0.down", "1.0.gate"]}),
    ("parameters 5", "gated", {"target_modules": [], "target_parameters": ["down", "up"], "rank_pattern": {"0.up": 3}}),
    ("experts", "experts", {"target_modules": [], "target_parameters": ["up", "down"], "rank_pattern": {"0.up": 2}}),
    ("patterns", "mlp", {"target_modules": ["lin1"], "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin1": 16}}),
]  # fmt: skip


# The factors of groups are one dense factor there, whose sums have zeros in them.
LOOSE = ("groups2",)


def in_peft(peft: Any, model: nn.Module, config: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    # Some kernels of torch round otherwise where a weight could get a gradient.
    return wrapped.requires_grad_(False)


def from_peft(peft: Any, model: nn.Module, directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()


def saved_by_peft(wrapped: Any, directory: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("model", "config"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_both_ways(peft: Any, tmp_path: Path, model: str, config: dict[str, Any]) -> None:
    build, example = BUILD[model]
    plain, x = build().eval(), example()
    wrapped = in_peft(peft, plain, config)
    saved_by_peft(wrapped, tmp_path / "theirs")
    captured = capture(plain, (x,)).module
    load_adapter(captured, tmp_path / "theirs")
    with torch.no_grad():
        expected = wrapped(x)
        assert (expected - plain(x)).abs().max() > 1e-3
        assert rounding(captured(x), expected) <= ROUNDINGS

    save_adapter(captured, tmp_path / "ours")
    again = from_peft(peft, plain, tmp_path / "ours")
    with torch.no_grad():
        assert rounding(again(x), expected) <= ROUNDINGS
        if "target_parameters" in config:
            merge(captured, (x,))
            assert torch.allclose(captured(x), expected, atol=1e-5)
            unmerge(captured)
            assert rounding(captured(x), expected) <= ROUNDINGS


@pytest.mark.parametrize(("model", "config"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_file_of_fxopt_has_the_keys_of_peft(peft: Any, tmp_path: Path, model: str, config: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    build, example = BUILD[model]
    plain, x = build().eval(), example()
    saved_by_peft(in_peft(peft, plain, config), tmp_path / "theirs")
    captured = capture(plain, (x,)).module
    load_adapter(captured, tmp_path / "theirs")
    save_adapter(captured, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_biases_of_a_module_that_is_saved_whole_too(peft: Any, tmp_path: Path) -> None:
    plain, x = MLP().eval(), torch.randn(3, 10)
    wrapped = in_peft(peft, plain, {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["lin1"]})
    saved_by_peft(wrapped, tmp_path / "theirs")
    module = capture(plain, (x,)).module
    load_adapter(module, tmp_path / "theirs")
    save_adapter(module, tmp_path / "ours")
    with torch.no_grad():
        assert rounding(module(x), wrapped(x)) <= ROUNDINGS
        assert rounding(from_peft(peft, plain, tmp_path / "ours")(x), wrapped(x)) <= ROUNDINGS


@pytest.mark.parametrize(("bias", "expected"), [("all", ["lin0.bias", "lin1.bias"]), ("lora_only", ["lin0.bias"])])
def test_biases_of_a_file_train_with_its_adapter(peft: Any, tmp_path: Path, bias: str, expected: list[str]) -> None:
    plain, x = MLP().eval(), torch.randn(3, 10)
    saved_by_peft(in_peft(peft, plain, {"target_modules": ["lin0"], "bias": bias}), tmp_path)
    module = capture(plain, (x,)).module
    load_adapter(module, tmp_path, "first")
    load_adapter(module, tmp_path, "second")
    for name in ("first", "second"):
        set_adapter(module, name)
        trains = {path for path, parameter in module.named_parameters() if parameter.requires_grad}
        assert trains == {f"lora.lin0.{name}.{factor}" for factor in "AB"} | set(expected)


@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_a_tied_weight_have_the_adapters_that_a_file_has_for_each(
    peft: Any, tmp_path: Path, dora: bool
) -> None:
    plain, x = Tied().eval(), torch.randint(0, 20, (3, 5))
    wrapped = in_peft(peft, plain, {"target_modules": ["embed", "head"], "rank_pattern": {"head": 3}, "use_dora": dora})
    saved_by_peft(wrapped, tmp_path / "theirs")
    module = capture(plain, (x,)).module
    load_adapter(module, tmp_path / "theirs")
    save_adapter(module, tmp_path / "ours")
    with torch.no_grad():
        expected = wrapped(x)
        assert rounding(module(x), expected) <= ROUNDINGS
        assert rounding(from_peft(peft, plain, tmp_path / "ours")(x), expected) <= ROUNDINGS
        merge(module, x)
        assert torch.allclose(module(x), expected, atol=1e-4)


def test_one_adapter_of_a_tied_weight_stays_one_unless_a_file_has_two(peft: Any, tmp_path: Path) -> None:
    plain, x = Tied().eval(), torch.randint(0, 20, (3, 5))
    wrapped = in_peft(peft, plain, {"target_modules": ["embed", "head"]})
    module = capture(plain, (x,)).module
    inject(module, LoRA(rank=8, targets=("*",)))
    save_adapter(module, tmp_path / "ours")
    for directory, is_one in ((saved_by_peft(wrapped, tmp_path / "theirs"), False), (tmp_path / "ours", True)):
        load_adapter(module, directory)
        assert (module.get_submodule("lora.embed.default") is module.get_submodule("lora.head.default")) is is_one
        with torch.no_grad():
            assert rounding(module(x), plain(x) if is_one else wrapped(x)) <= ROUNDINGS


@pytest.mark.parametrize("order", ["plain dora", "dora plain"])
@pytest.mark.parametrize(("model", "layer"), [("mlp", "lin0"), ("conv2d", "conv2d")])
def test_a_length_is_none_of_the_bias_that_an_adapter_before_adds(
    peft: Any, tmp_path: Path, model: str, layer: str, order: str
) -> None:
    build, example = BUILD[model]
    plain, x = build().eval(), example()
    module = capture(plain, (x,)).module
    for name, options in {"plain": BIAS, "dora": DORA}.items():
        saved_by_peft(in_peft(peft, plain, {"target_modules": [layer], **options}), tmp_path / name)
        load_adapter(module, tmp_path / name, name)
    weighted(module, dict.fromkeys(order.split(), 0.5))
    with torch.no_grad():
        expected = module(x)
        merge(module, (x,))
        assert torch.allclose(module(x), expected, atol=1e-4)


def test_layers_that_the_model_does_not_use(peft: Any, tmp_path: Path) -> None:
    plain, x = MLP().eval(), torch.randn(3, 10)  # type: Any, torch.Tensor
    plain.add_module("unused", nn.Linear(10, 10))
    plain.add_module("tied", nn.Linear(10, 20))
    plain.tied.weight = plain.lin0.weight
    wrapped = in_peft(peft, plain, {"target_modules": ["lin0", "unused", "tied"]})
    module = capture(plain, (x,)).module
    load_adapter(module, saved_by_peft(wrapped, tmp_path / "both"))
    with torch.no_grad():
        assert rounding(module(x), wrapped(x)) <= ROUNDINGS
    saved_by_peft(in_peft(peft, plain, {"target_modules": ["unused"]}), tmp_path / "one")
    with pytest.raises(ArtifactError, match="holds no tensors of an adapter of a layer that the model uses"):
        load_adapter(module, tmp_path / "one")


class Chooses(nn.Module):
    """Opaque; the example calls one of its layers, and no graph shows the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (self.left if x.sum().item() > 0 else self.right)(x)
        return out


def test_a_layer_that_only_python_calls_is_not_one_that_is_not_used(peft: Any, tmp_path: Path) -> None:
    plain, x = Chooses().eval(), torch.ones(2, 4)
    module = capture(plain, (x,)).module
    saved_by_peft(in_peft(peft, plain, {"target_modules": ["left", "right"]}), tmp_path)
    with pytest.raises(ArtifactError, match="is for a layer 'right' that the model hasn't"):
        load_adapter(module, tmp_path)


@pytest.mark.parametrize("saved", ["embed", "head"])
def test_what_is_saved_whole_is_saved_for_all_that_share_its_weight(peft: Any, tmp_path: Path, saved: str) -> None:
    plain, x = Tied().eval(), torch.randint(0, 20, (3, 5))
    module = capture(plain, (x,)).module
    inject(module, LoRA(targets=("body",), modules_to_save=(saved,)))
    with torch.no_grad():
        module.get_parameter(f"{saved}.weight").add_(0.5)
        save_adapter(module, tmp_path)
        load_adapter(fresh := capture(plain, (x,)).module, tmp_path)
        assert rounding(fresh(x), module(x)) <= ROUNDINGS
        assert rounding(from_peft(peft, plain, tmp_path)(x), module(x)) <= ROUNDINGS


@pytest.mark.filterwarnings("ignore")
def test_the_base_of_an_embedding_in_a_file(peft: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, tie_word_embeddings=True, **sizes)).eval()
    ids = torch.randint(0, 20, (2, 5))
    wrapped = in_peft(peft, plain, {"target_modules": ["embed_tokens", "q_proj"]})
    saved_by_peft(wrapped, tmp_path / "theirs")
    module = capture(plain, (ids,)).module
    load_adapter(module, tmp_path / "theirs")
    save_adapter(module, tmp_path / "ours")
    assert not module.get_parameter("model.embed_tokens.weight").requires_grad
    assert module.get_parameter("model.embed_tokens.weight") is module.get_parameter("lm_head.weight")
    with torch.no_grad():
        expected = wrapped(ids).logits
        assert rounding(module(ids).logits, expected) <= ROUNDINGS
        assert rounding(from_peft(peft, plain, tmp_path / "ours")(ids).logits, expected) <= ROUNDINGS


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rank_pattern": {"*l0*": 2, "?": 1}}], ids=str)
@pytest.mark.parametrize("name", ADAPTED)
def test_what_is_saved_here_is_loaded_here(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    build, example, _ = ADAPTED[name]
    plain, x = build().double().eval(), example()
    x = x.double() if x.is_floating_point() else x
    module, fresh = (capture(plain, (x,)).module for _ in range(2))
    inject(module, LoRA(rank=3, targets=("*",), **options))
    randomize(module)
    save_adapter(nn.Sequential(module), tmp_path)  # as DistributedDataParallel holds it
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.allclose(fresh(x), module(x), rtol=1e-5, atol=1e-6 * module(x).abs().max())


@pytest.mark.parametrize(
    "options",
    [{"alpha_pattern": {"mha.out_proj": 30.0}}, {"rank_pattern": {"mha.out_proj": 2}}, {"exclude": ("mha.out_proj",)}],
    ids=str,
)
def test_projections_of_attention_that_differ_are_loaded_there(
    peft: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain, x = MHA().eval(), torch.randn(4, 3, 10)
    captured = capture(plain, (x,)).module
    inject(captured, LoRA(rank=4, targets=("mha",), **options))
    randomize(captured)
    save_adapter(captured, tmp_path)
    with torch.no_grad():
        assert rounding(from_peft(peft, plain, tmp_path)(x), captured(x)) <= ROUNDINGS


@pytest.mark.parametrize(
    "model", ["mlp", "conv2d", "conv3d", "conv1d", "mha", "embedding", "groups2", "gated", "experts"]
)
def test_trained_here_and_loaded_there(peft: Any, tmp_path: Path, model: str) -> None:
    build, example = BUILD[model]
    plain, x = build().eval(), example()
    captured = capture(plain, (x,)).module
    inject(captured, LoRA(rank=4, alpha=8, dropout=0.1, targets=("*",)))
    randomize(captured)
    save_adapter(captured, tmp_path)
    with torch.no_grad():
        expected = captured(x)
        error = rounding(from_peft(peft, plain, tmp_path)(x), expected)
        assert error <= ROUNDINGS * (20 if model in LOOSE else 1)
        merge(captured, (x,))


@pytest.mark.parametrize("kind", [nn.Linear, lambda *sizes: nn.Conv1d(*sizes, 1)], ids=["linear", "conv"])
def test_slices_of_a_file_still_train_alone(peft: Any, tmp_path: Path, kind: Callable[..., nn.Module]) -> None:
    plain, x = nn.Sequential(kind(8, 24)), torch.randn(2, 8, 8)
    module, fresh = (capture(plain, (x,)).module for _ in range(2))
    inject(module, LoRA(rank=2, targets=("0",), slices=("v", "0-5")))
    randomize(module)
    save_adapter(module, tmp_path)
    load_adapter(fresh, tmp_path)
    masks = [each.get_submodule("lora.0.default").mask for each in (module, fresh)]
    assert torch.equal(*masks)
    with torch.no_grad():
        assert rounding(fresh(x), module(x)) <= ROUNDINGS
        assert rounding(from_peft(peft, plain, tmp_path)(x), module(x)) <= ROUNDINGS


def test_what_is_saved_whole_comes_in_the_types_of_the_model(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    captured = capture(model, (x,)).module
    inject(captured, LoRA(targets=("0",), modules_to_save=("1",)))
    save_adapter(captured, tmp_path)
    wide = capture(model.double(), (x.double(),)).module
    load_adapter(wide, tmp_path)
    assert {value.dtype for value in wide.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert wide.get_buffer("1.num_batches_tracked").dtype is torch.int64
    wide(x.double())
