"""Every transformers model type that a small config can be made for, found from the library's own mappings.

Nothing here knows a model by name but `_CONFIGS`, for types whose sizes hang together in a way that can't be
read off their config.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fxopt.inputs import Inputs
from fxopt.torchvision_operators import declare_missing
from zoo_models.specimen import Built, Specimen

VOCABULARY = 120
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
_CONFIGS: dict[str, dict[str, Any]] = {}
_PARAMETERS = 20_000_000


def specimens() -> Iterator[Specimen]:
    """One for each model type, and one that is given a cache for each decoder."""
    declare_missing()
    # Imported here, before each model gets a process of its own.
    importlib.import_module("transformers.modeling_utils")
    importlib.import_module("transformers.models.bart.modeling_bart")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    for model_type in MODEL_MAPPING_NAMES:
        yield Specimen(model_type, "transformers", "model", functools.partial(_build, model_type))
        if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            build = functools.partial(_build, model_type, with_cache=True)
            yield Specimen(f"{model_type} (given a cache)", "transformers", "decoder", build)


def _build(model_type: str, with_cache: bool = False) -> Built:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config, module = _smallest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING if with_cache else MODEL_MAPPING)
    module = module.eval()
    if with_cache:
        return module, {
            "example": _continued(module, 2, 6),
            "batch": _continued(module, 3, 6),
            "size": _continued(module, 2, 9),
        }
    return module, {
        "example": _inputs(module, config, 2, 12),
        "batch": _inputs(module, config, 3, 12),
        "size": _inputs(module, config, 2, 9, larger=True),
    }


def _smallest(model_type: str, mapping: Any) -> tuple[Any, nn.Module]:
    """The first of a few ways to shrink the default config that the model can be built and run with."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    default = cls().to_dict()
    failure: Exception | None = None
    for names in (_SMALL, dict.fromkeys(_LAYERS_ONLY, 2)):
        try:
            config = cls(**(_shrunk(default, names) | copy.deepcopy(_CONFIGS.get(model_type, {}))))
            model = mapping[type(config)]
            model = model[0] if isinstance(model, (list, tuple)) else model
            with torch.device("meta"):
                parameters = sum(p.numel() for p in model(copy.deepcopy(config)).parameters())
            if parameters > _PARAMETERS:
                raise ValueError(f"{parameters / 1e6:.0f} million parameters")
            module = model(config).eval()
            with torch.no_grad():
                inputs = _inputs(module, config, 2, 12)
                module(*inputs.args, **inputs.kwargs)
        except Exception as error:  # whatever a config or a constructor refuses
            failure = failure or error
            continue
        return config, model(config)
    raise RuntimeError(f"no small config: {type(failure).__name__}: {failure}") from failure


def _shrunk(default: Mapping[str, Any], small: Mapping[str, int]) -> dict[str, Any]:
    """What to change about a config, in the sub-configs too."""
    changes: dict[str, Any] = {}
    token = VOCABULARY - 30
    for name, value in default.items():
        if isinstance(value, dict) and "model_type" in value:
            changes[name] = _shrunk(value, small)
            changes[name]["model_type"] = value["model_type"]
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


def _inputs(module: nn.Module, config: Any, batch: int, length: int, larger: bool = False) -> Inputs:
    names = set(inspect.signature(module.forward).parameters)
    generator = torch.Generator().manual_seed(batch * 100 + length)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(5, VOCABULARY - 40, (batch, count), generator=generator)

    kwargs: dict[str, Any] = {}
    main = getattr(module, "main_input_name", "input_ids")
    if "input_ids" in names and main not in ("pixel_values", "input_features", "input_values"):
        kwargs["input_ids"] = tokens(length)
    if main == "pixel_values" or ("pixel_values" in names and "get_image_features" in dir(module) and _is_dual(module)):
        kwargs["pixel_values"] = _images(config, batch, larger, generator)
        if "input_ids" in names and _is_dual(module):
            kwargs["input_ids"] = tokens(length)
    if main == "input_features" and main in names:
        bins = _find(config, "num_mel_bins") or _find(config, "feature_size") or 80
        frames = 2 * (_find(config, "max_source_positions") or 40)
        kwargs[main] = torch.randn(batch, bins, frames, generator=generator)
        if _find(config, "input_feat_per_channel") or "conformer" in type(module).__name__.lower():
            kwargs[main] = kwargs[main].transpose(1, 2).contiguous()
    if main == "input_values" and main in names:
        kwargs[main] = torch.randn(batch, 4000 + 200 * length, generator=generator)
    if "decoder_input_ids" in names:
        kwargs["decoder_input_ids"] = tokens(length - 4)
    return Inputs((), {name: value for name, value in kwargs.items() if name in names})


def _images(config: Any, batch: int, larger: bool, generator: torch.Generator) -> torch.Tensor:
    size = _find(config, "image_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    more = 32 if larger else 0
    channels = _find(config, "num_channels") or 3
    shape: tuple[int, ...] = (batch, channels, height + more, width + more)
    frames = _find(config, "num_frames")
    if frames:
        shape = (batch, frames, *shape[1:])
    return torch.randn(shape, generator=generator)


def _is_dual(module: nn.Module) -> bool:
    return hasattr(module, "text_projection") and hasattr(module, "visual_projection")


def _find(config: Any, name: str) -> Any:
    """A setting of a config or of the first of its sub-configs that has it."""
    value = getattr(config, name, None)
    if value is not None:
        return value
    for part in ("vision_config", "audio_config", "encoder_config", "backbone_config", "encoder"):
        value = getattr(getattr(config, part, None), name, None)
        if value is not None:
            return value
    return None


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
