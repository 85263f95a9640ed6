"""Every transformers model type that a small config can be made for, found from the library's own mappings.

Nothing here knows a model by name but `_CONFIGS`, for types whose sizes hang together in a way that can't be
read off their config.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxopt.inputs import Inputs
from fxopt.torchvision_operators import declare_missing
from zoo_models.specimen import Built, Specimen
from zoo_models.transformers_inputs import VOCABULARY, Sizes, inputs, wanted

_WIDTHS = {
    64: "hidden_size d_model n_embd dim intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim embedding_size "
    "moe_intermediate_size shared_expert_intermediate_size dim_feedforward hidden_dim n_inner ffn_hidden_size "
    "projection_dim out_hidden_size projector_hidden_size output_hidden_size shared_intermediate_size "
    "emb_dim feed_forward_size d_inner encoder_hidden_dim decoder_hidden_size vision_hidden_size q_lora_rank "
    "kv_lora_rank text_embed_dim lru_width rotary_dim_size word_embed_proj_dim backbone_hidden_size "
    "moe_shared_expert_intermediate_size dense_intermediate_size expert_ffn_hidden_size mamba_d_ssm",
    16: "head_dim d_kv attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels d_head "
    "mamba_d_head index_head_dim linear_key_head_dim linear_value_head_dim time_step_rank state_size rotary_dim "
    "mamba_head_dim ssm_state_size mamba_d_state",
    32: "qk_head_dim",
    4: "num_attention_heads encoder_attention_heads decoder_attention_heads num_heads n_head n_heads n_routed_experts "
    "num_experts num_local_experts num_expert linear_num_value_heads linear_num_key_heads index_n_heads",
    2: "num_hidden_layers encoder_layers decoder_layers num_layers n_layer n_layers depth num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_experts_per_tok moe_topk num_experts_per_token n_group "
    "topk_group num_hidden_groups decoder_num_hidden_layers encoder_num_hidden_layers decoder_num_attention_heads "
    "encoder_num_attention_heads num_kv_heads mamba_n_heads num_selected_experts num_conv_pos_embedding_groups "
    "encoder_num_key_value_heads decoder_num_key_value_heads num_block_records",
    1: "n_shared_experts num_shared_experts first_k_dense_replace mamba_n_groups",
    256: "max_position_embeddings n_positions max_target_positions",
}
_SMALL = {name: size for size, names in _WIDTHS.items() for name in names.split()} | {
    "image_size": 64,
    "num_mel_bins": 16,
    "max_source_positions": 30,
    "num_queries": 10,
    "sliding_window": 16,
}
_VOCABULARIES = ("vocab_size", "decoder_vocab_size", "text_vocab_size", "encoder_vocab_size")
_LAYERS_ONLY = tuple(_WIDTHS[2].split()[:9])
_CONFIGS: dict[str, dict[str, Any]] = {
    # Block-sparse attention is for 700 tokens and more; with fewer, a model replaces its own layers when first called.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "dots1": {"first_k_dense_replace": 1, "n_routed_experts": 4},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "timm_backbone": {"backbone": "resnet18"},
    "efficientnet": {"image_size": 64},
}
_PARAMETERS = 150_000_000


def _without(*sizes: int) -> dict[str, int]:
    return {name: size for name, size in _SMALL.items() if size not in sizes}


# The sizes of heads hang together in ways of their own, and layers alternate in threes and fours.
# Whether to repeat what stays in the sub-configs, and what to make smaller.
_WAYS: tuple[tuple[bool, dict[str, int]], ...] = (
    (True, _SMALL),
    (False, _SMALL),
    (True, _SMALL | {"num_key_value_heads": 4}),
    (True, _SMALL | {"num_key_value_heads": 4} | dict.fromkeys(_LAYERS_ONLY, 8)),
    (True, _without(16, 32)),
    (False, _without(16, 32) | dict.fromkeys(_LAYERS_ONLY, 4)),
    (False, dict.fromkeys(_LAYERS_ONLY, 2)),
)


def specimens() -> Iterator[Specimen]:
    """One for each model type, one given a cache for each decoder, a padded one for a fourth of what reads text."""
    declare_missing()
    # Imported here, before each model gets a process of its own.
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("transformers.models.bart.modeling_bart")
    from transformers.models.auto import modeling_auto as auto

    decoders = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    texts = {**decoders, **auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, **auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    for model_type in auto.MODEL_MAPPING_NAMES:
        yield Specimen(model_type, "transformers", "model", functools.partial(_build, model_type))
        if model_type in decoders:
            build = functools.partial(_build, model_type, "given a cache")
            yield Specimen(f"{model_type} (given a cache)", "transformers", "decoder", build)
        if model_type in texts and zlib.crc32(model_type.encode()) % 4 == 0:
            build = functools.partial(_build, model_type, "padded")
            yield Specimen(f"{model_type} (padded)", "transformers", "padded", build)


def _build(model_type: str, call: str = "") -> Built:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if call == "given a cache" else MODEL_MAPPING
    config, module, names, other_axes = _smallest(model_type, mapping)
    if call == "given a cache":
        return module, {
            "example": _continued(module, 2, 6),
            "batch": _continued(module, 3, 6),
            "size": _continued(module, 2, 9),
        }
    padded = call == "padded"
    if padded and not {"input_ids", "attention_mask"} <= inspect.signature(module.forward).parameters.keys():
        raise RuntimeError("it takes no attention mask")
    names |= {"attention_mask"} if padded else set()
    example = functools.partial(_example, config, names, other_axes=other_axes, padded=padded)
    return module, {
        "example": example(),
        "batch": example(batch=3),
        "size": example(length=9, larger=True),
    }


def _example(config: Any, names: frozenset[str], **sizes: Any) -> Inputs:
    return inputs(config, names, Sizes(**sizes))


def _smallest(model_type: str, mapping: Any) -> tuple[Any, nn.Module, frozenset[str], bool]:
    """The first of a few ways to shrink the default config that the model can be built and run with."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    default = cls().to_dict()
    failures: list[str] = []
    for whole, way in _WAYS:
        try:
            config = cls(**(_shrunk(default, way, whole) | copy.deepcopy(_CONFIGS.get(model_type, {}))))
            model = mapping[type(config)]
            model = model[0] if isinstance(model, (list, tuple)) else model
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model(copy.deepcopy(config)).parameters())
            if parameters > _PARAMETERS:
                raise ValueError(f"{parameters / 1e6:.0f} million parameters")
            module = model(config).eval()
            names, other_axes = wanted(module, config)
        except Exception as error:  # whatever a config or a constructor refuses
            failures.append(f"{type(error).__name__}: {error}"[:200])
            continue
        return config, model(config).eval(), names, other_axes
    raise RuntimeError("no small config: " + " / ".join(dict.fromkeys(failures)))


def _shrunk(default: Mapping[str, Any], small: Mapping[str, int], whole: bool) -> dict[str, Any]:
    """What to change about a config, in the sub-configs too; `whole` repeats what is not changed in those."""
    changes: dict[str, Any] = {}
    token = VOCABULARY - 30
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            kept = {key: copy.deepcopy(item) for key, item in value.items() if whole or key == "model_type"}
            changes[name] = kept | _shrunk(value, small, whole)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in _VOCABULARIES and value > VOCABULARY:
            changes[name] = VOCABULARY
        elif name.endswith(("token_id", "token_index")) and value >= VOCABULARY - 30:
            changes[name] = token
            token += 1
        elif name in small and value > small[name]:
            changes[name] = small[name]
    return changes


def _continued(module: nn.Module, batch: int, length: int) -> Inputs:
    """One more token for a decoder, and the cache of the tokens before."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    before = torch.randint(5, VOCABULARY - 40, (batch, length), generator=generator)
    with torch.no_grad():
        cache = module(input_ids=before, use_cache=True).past_key_values
    if cache is None:
        raise RuntimeError("it gives no cache")
    token = torch.randint(5, VOCABULARY - 40, (batch, 1), generator=generator)
    return Inputs((), {"input_ids": token, "past_key_values": cache, "use_cache": True})
