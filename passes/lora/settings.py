"""What adapter_config.json says of the tensors beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxopt.errors import ArtifactError

_UNKNOWN = (
    "kasa_config velora_config monteclora_config arrow_config bdlora_config trainable_token_indices layer_replication "
    "megatron_config use_qalora alora_invocation_tokens use_bdlora"
).split()
_MOVES_WEIGHT = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the names of the inits begin that change the base weight, as PEFT does again when it loads such a file."""


@dataclass(frozen=True)
class Settings:
    """The options that decide on what the tensors of a file mean.

    Attributes:
        rank, alpha: of layers that no pattern names.
        rslora, dora, dropout: as in the pass `lora`.
        rank_pattern, alpha_pattern: by name of a layer, or a regular expression over its end.
        targets: `target_modules`: a regular expression, or names and ends of names.
        parameters: `target_parameters`.
        restricted: whether further options narrow the targets.
        bias: which biases are saved with it: `none`, `all`, `lora_only`.
        columns: of each sliced B, by its path in the file; see `Entry`.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: str | tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    restricted: bool = False
    bias: str = "none"
    columns: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """r of a layer."""
        return int(_of(self.rank_pattern, name, self.rank))

    def alpha_of(self, name: str) -> float:
        """alpha of a layer."""
        return float(_of(self.alpha_pattern, name, self.alpha))

    def is_parameter(self, name: str) -> bool:
        """Whether `target_parameters` means a parameter."""
        return any(name == target or name.endswith(f".{target}") for target in self.parameters)

    def parameters_at(self, path: str) -> list[str]:
        """The parameters that it means of a module, as far as can be told without it."""
        owners = ((target.rpartition(".")[0], target.rpartition(".")[2]) for target in self.parameters)
        found = (leaf for owner, leaf in owners if not owner or f".{path}".endswith(f".{owner}"))
        return [f"{path}.{leaf}" if path else leaf for leaf in found]

    def is_target(self, name: str) -> bool:
        """Whether `target_modules` means a layer."""
        if isinstance(self.targets, str):
            return self.targets != "all-linear" and re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


def to_settings(config: Mapping[str, Any], source: str) -> Settings:
    """Read a configuration.

    Raises:
        ArtifactError: another kind of adapter than LoRA, or options that fxopt does not have.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ArtifactError(f"'{source}' is an adapter of type {kind!r}, expected 'LORA'")
    unknown = [key for key in _UNKNOWN if config.get(key)]
    if unknown:
        raise ArtifactError(f"'{source}' uses '{unknown[0]}', which fxopt does not have")
    init = str(config.get("init_lora_weights"))
    if init.startswith(_MOVES_WEIGHT):
        raise ArtifactError(
            f"'{source}' is for what init '{init}' left of the weights, not for the original ones: save it in PEFT "
            "with 'path_initial_model_for_weight_conversion', or, if the model has those weights, set "
            "'init_lora_weights' there to true"
        )
    try:
        targets = config.get("target_modules") or ()
        return Settings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            dropout=float(config.get("lora_dropout") or 0.0),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
            targets=targets if isinstance(targets, str) else tuple(targets),
            parameters=tuple(config.get("target_parameters") or ()),
            restricted=bool(config.get("layers_to_transform") is not None or config.get("exclude_modules")),
            bias=str(config.get("bias") or "none"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{source}' is no configuration of an adapter: {error!r}") from error


def _of(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
