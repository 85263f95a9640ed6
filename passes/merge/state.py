"""State that was saved under the names from before a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class FormerParameters:
    """Lets a state_dict from before the merge load: a hook of the root.

    Attributes:
        new: the names of the merged layer.
        parts: for each layer the names of its weight, and those of its bias.
        has_bias: whether the merged layer has a bias.
    """

    new: tuple[str, ...]
    parts: tuple[tuple[tuple[str, ...], ...], ...]
    has_bias: bool

    def __call__(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Join what is there under the old names, if all of it is."""
        present = [names for part in self.parts for names in part if names]
        if not all(any(prefix + name in state for name in names) for names in present):
            return  # loading says which names are missing
        rows = [
            [[state.pop(prefix + name) for name in names if prefix + name in state] for names in part]
            for part in self.parts
        ]
        for new in self.new:
            state[f"{prefix}{new}.weight"] = torch.cat([weight[0] for weight, _ in rows])
            if self.has_bias:
                state[f"{prefix}{new}.bias"] = torch.cat(
                    [bias[0] if bias else weight[0].new_zeros(len(weight[0])) for weight, bias in rows]
                )
