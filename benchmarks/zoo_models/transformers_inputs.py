"""Example inputs for a transformers model, by the names of its forward's parameters and by what its config says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.inputs import Inputs

VOCABULARY = 120
_PARTS = ("vision_config", "audio_config", "text_config", "encoder_config", "backbone_config", "encoder", "decoder")


def find(config: Any, *names: str) -> Any:
    """The first of some settings that a config or one of its parts has."""
    for each in (config, *(getattr(config, part, None) for part in _PARTS)):
        for name in names:
            value = getattr(each, name, None)
            if value is not None:
                return value
    return None


@dataclass(frozen=True)
class Sizes:
    """What one example is like.

    Attributes:
        batch: how many samples.
        length: how many tokens each.
        larger: whether images are larger than the config says.
        other_axes: whether spectra are given with frames before bins, and sounds with a channel.
        padded: whether the attention mask hides the end of some samples.
    """

    batch: int = 2
    length: int = 12
    larger: bool = False
    other_axes: bool = False
    padded: bool = False


class Maker:
    """Makes tensors by their names.

    Args:
        config: of the model.
        sizes: of the example.
    """

    def __init__(self, config: Any, sizes: Sizes):
        self.config = config
        self.sizes = sizes
        self.generator = torch.Generator().manual_seed(sizes.batch * 100 + sizes.length)

    def make(self, name: str) -> Any:
        """The tensor for a parameter, None where nothing is known of its name."""
        maker = _MAKERS.get(name)
        return maker(self) if maker else None

    def noise(self, *shape: int) -> torch.Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def ones(self, *shape: int) -> torch.Tensor:
        """A mask that hides nothing."""
        return torch.ones(shape, dtype=torch.long)

    def tokens(self, fewer: int = 0) -> torch.Tensor:
        """Numbers of words, none of them special."""
        return torch.randint(
            5, VOCABULARY - 40, (self.sizes.batch, self.sizes.length - fewer), generator=self.generator
        )

    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        size = find(self.config, "image_size") or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        more = 32 if self.sizes.larger else 0
        return find(self.config, "num_channels", "in_channels") or 3, height + more, width + more

    def images(self) -> torch.Tensor:
        """Images, or clips where the config has frames."""
        frames = find(self.config, "num_frames")
        return self.noise(self.sizes.batch, *((frames,) if frames else ()), *self.image())

    def frames(self) -> int:
        """How many windows of sound."""
        return 2 * (find(self.config, "max_source_positions") or 40)

    def features(self) -> torch.Tensor:
        """Spectra: (batch, bins, frames), as Whisper takes them."""
        bins = find(self.config, "num_mel_bins", "feature_size", "input_feat_size", "n_mels") or 80
        spectra = self.noise(self.sizes.batch, bins, self.frames())
        return spectra.transpose(1, 2).contiguous() if self.sizes.other_axes else spectra

    def sounds(self) -> torch.Tensor:
        """Waves: (batch, samples), or (batch, 1, samples); spectra where the config has bins and a length."""
        bins, frames = find(self.config, "num_mel_bins"), find(self.config, "max_length")
        if bins and frames:
            return self.noise(self.sizes.batch, frames, bins)
        samples = 4000 + 200 * self.sizes.length
        return self.noise(self.sizes.batch, *((1,) if self.sizes.other_axes else ()), samples)

    def mask(self) -> torch.Tensor:
        """Which tokens are there: all of them or, where the example is padded, fewer for each sample."""
        mask = self.ones(self.sizes.batch, self.sizes.length)
        for row in range(self.sizes.batch if self.sizes.padded else 0):
            mask[row, self.sizes.length - 2 - row :] = 0
        return mask

    def boxes(self) -> torch.Tensor:
        """Boxes on a page of 1,000 by 1,000, the corner further from the origin last."""
        corners = torch.randint(0, 400, (self.sizes.batch, self.sizes.length, 2), generator=self.generator)
        return torch.cat((corners, corners + 100), dim=-1)

    def grid(self) -> torch.Tensor:
        """One image of 4 by 4 patches for each sample."""
        return torch.tensor([[1, 4, 4]]).repeat(self.sizes.batch, 1)

    def patches(self) -> torch.Tensor:
        """The patches of that grid, each flat."""
        config = self.config
        patch = find(config, "patch_size") or 14
        depth = find(config, "temporal_patch_size") or 1
        channels = find(config, "in_channels", "in_chans", "num_channels") or 3
        return self.noise(self.sizes.batch * 16, channels * depth * patch * patch)

    def series(self) -> torch.Tensor:
        """The past of a time series."""
        lags = find(self.config, "lags_sequence")
        length = (find(self.config, "context_length") or 32) + (max(lags) if lags else 0)
        channels = find(self.config, "num_input_channels")
        return self.noise(self.sizes.batch, length, *((channels,) if channels else ()))

    def embeddings(self) -> torch.Tensor:
        """Embedded tokens."""
        width = find(self.config, "hidden_size", "d_model") or 64
        return self.noise(self.sizes.batch, self.sizes.length, width)


_MAKERS: dict[str, Callable[[Maker], Any]] = {
    "input_ids": Maker.tokens,
    "decoder_input_ids": lambda maker: maker.tokens(fewer=4),
    "qformer_input_ids": Maker.tokens,
    "pixel_values": Maker.images,
    "pixel_values_videos": lambda maker: maker.noise(
        maker.sizes.batch, find(maker.config, "num_frames", "frames_per_clip") or 4, *maker.image()
    ),
    "input_features": Maker.features,
    "input_values": Maker.sounds,
    "input_features_mask": lambda maker: maker.ones(maker.sizes.batch, maker.frames()),
    "bbox": Maker.boxes,
    "visual_feats": lambda maker: maker.noise(maker.sizes.batch, 5, find(maker.config, "visual_feat_dim") or 64),
    "visual_pos": lambda maker: maker.noise(maker.sizes.batch, 5, 4),
    "grid_thw": Maker.grid,
    "hidden_states": Maker.patches,
    "query_embeds": lambda maker: maker.noise(
        maker.sizes.batch, find(maker.config, "num_query_tokens") or 8, find(maker.config, "hidden_size") or 64
    ),
    "inputs_embeds": Maker.embeddings,
    "past_values": Maker.series,
    "past_observed_mask": lambda maker: torch.ones_like(maker.series()),
    "past_time_features": lambda maker: maker.noise(
        *maker.series().shape[:2], find(maker.config, "num_time_features") or 1
    ),
    "past_values_padding": lambda maker: torch.zeros_like(maker.series()),
    "freq": lambda maker: torch.zeros(maker.sizes.batch, 1, dtype=torch.long),
    "prompt_pixel_values": Maker.images,
    "prompt_masks": Maker.images,
    "attention_mask": Maker.mask,
    "pixel_attention_mask": lambda maker: maker.ones(maker.sizes.batch, 16),
    "spatial_shapes": lambda maker: torch.tensor([[4, 4]]).repeat(maker.sizes.batch, 1),
    "states": lambda maker: maker.noise(maker.sizes.batch, maker.sizes.length, find(maker.config, "state_dim") or 17),
    "actions": lambda maker: maker.noise(maker.sizes.batch, maker.sizes.length, find(maker.config, "act_dim") or 4),
    "returns_to_go": lambda maker: maker.noise(maker.sizes.batch, maker.sizes.length, 1),
    "timesteps": lambda maker: torch.arange(maker.sizes.length).repeat(maker.sizes.batch, 1),
}
_DESCRIBING = frozenset({"grid_thw", "spatial_shapes"})
"""Parameters that hold the sizes of what others hold."""
_MAIN = ("input_ids", "pixel_values", "input_features", "input_values")


def wanted(module: nn.Module, config: Any) -> tuple[frozenset[str], bool]:
    """The parameters that `module` can be run with, found by running it and reading what it says is missing.

    Returns their names, and whether they have the other axes.

    Raises:
        Exception: what its forward raises where nothing helps.
    """
    parameters = inspect.signature(module.forward).parameters
    names = {name for name, each in parameters.items() if each.default is each.empty and name in _MAKERS}
    names |= {getattr(module, "main_input_name", "input_ids"), "decoder_input_ids"} & parameters.keys() & _MAKERS.keys()
    first: Exception | None = None
    tried: set[frozenset[str]] = set()
    while True:
        given = frozenset(names)
        tried.add(given)
        errors: list[Exception] = []
        for other_axes in (False, True):
            try:
                with torch.no_grad():
                    module(**inputs(config, given, Sizes(other_axes=other_axes)).kwargs)
                return given, other_axes
            except Exception as error:  # whatever a forward raises
                errors.append(error)
        first = first or errors[0]
        said = set(re.findall(r"\w+", str(errors[0]).lower()))
        missing = {name for name in parameters if name in said and name not in given and name in _MAKERS}
        names |= missing or {name for name in _MAIN if name in parameters}
        if frozenset(names) in tried:
            raise first


def inputs(config: Any, names: frozenset[str], sizes: Sizes) -> Inputs:
    """A call with these parameters."""
    maker = Maker(config, sizes)
    return Inputs((), {name: maker.make(name) for name in sorted(names)}, static=sorted(names & _DESCRIBING))
