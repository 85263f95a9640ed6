"""Models of transformers, small and with random weights: files both ways, outputs with difference 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt import capture
from fxopt.torchvision_operators import declare_missing
from passes.lora import load_adapter, merge, save_adapter
from tests.passes.lora.test_peft_files import from_peft, in_peft, saved_by_peft


class First(nn.Module):
    """The first output of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


def build(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    declare_missing()
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ids = torch.randint(0, 64, (2, 7))
    if name == "bert":
        return t.BertModel(t.BertConfig(vocab_size=64, **small)), ids, ["query", "value", "word_embeddings"]
    if name == "gpt2":
        config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, use_cache=False)
        return t.GPT2LMHeadModel(config), ids, ["c_attn", "c_proj"]
    if name == "llama":
        config = t.LlamaConfig(vocab_size=64, use_cache=False, **small)
        return t.LlamaForCausalLM(config), ids, ["q_proj", "v_proj", "down_proj"]
    config = t.ViTConfig(image_size=16, patch_size=4, **small)
    return t.ViTModel(config), torch.randn(2, 3, 16, 16), ["query", "value", "projection"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_both_ways(peft: Any, tmp_path: Path, name: str) -> None:
    model, x, targets = build(name)
    plain = First(model.eval()).eval()
    wrapped = in_peft(peft, plain, {"target_modules": targets})
    saved_by_peft(wrapped, tmp_path / "theirs")
    module = capture(plain, (x,)).module
    load_adapter(module, tmp_path / "theirs")
    save_adapter(module, tmp_path / "ours")
    with torch.no_grad():
        expected = wrapped(x)
        assert (expected - plain(x)).abs().max() > 1e-3
        assert (module(x) - expected).abs().max() == 0
        assert (from_peft(peft, plain, tmp_path / "ours")(x) - expected).abs().max() == 0
        merge(module, (x,))
        assert (module(x) - expected).abs().max() < 1e-4
