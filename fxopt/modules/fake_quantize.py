"""Rounds a tensor to the values that an integer could hold, while it stays a float and trains."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

Observer = Literal["minmax", "ema", "current"]


class State(enum.Enum):
    """What a `FakeQuantize` does with what it is given."""

    OBSERVE = "observe"
    """Widens its range to hold it, and passes it on as it is."""
    QUANTIZE = "quantize"
    """Rounds it; in training mode the range follows first, in evaluation mode it never moves."""


class FakeQuantize(nn.Module):
    """q = clamp(round(x / scale) + zero_point, low, high);  y = (q - zero_point) * scale

    The gradient of y is that of x inside the range and zero outside (straight-through; Jacob et al. 2018).
    It always works in float32, under autocast too, and gives back the dtype that it was given. While it has
    not observed anything it passes its input on unchanged.

    Args:
        bits: width of the integer, 2 to 8, or 16.
        symmetric: signed integers around a zero point of 0, scale = max|x| / (2^(bits-1) - 1); else unsigned
            ones, whose zero point is where 0.0 falls, scale = (max - min) / (2^bits - 1).
        axis: the dimension that has a range for each index; None for one range for the whole tensor.
        channels: length of `axis`.
        observer: `minmax`, the union of all that was seen; `ema`, an exponential moving average of each
            batch's range with weight 0.1; `current`, the range of the tensor at hand (for weights).
        device: where the buffers live.

    Attributes:
        scale, zero_point, minimum, maximum: buffers; 0-d, or one value a channel.
        state: `State.OBSERVE` or `State.QUANTIZE`.
        ready: whether anything was observed.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        channels: int = 1,
        observer: Observer = "minmax",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if bits not in (*range(2, 9), 16):
            raise ValueError(f"bits: expected 2 to 8, or 16, got {bits}")
        self.bits = bits
        self.symmetric = symmetric
        self.axis = axis
        self.observer = observer
        self.low = -(2 ** (bits - 1)) if symmetric else 0
        self.high = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        self.state = State.QUANTIZE
        self.ready = False
        shape = () if axis is None else (channels,)
        self.register_buffer("scale", torch.ones(shape, device=device))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("minimum", torch.full(shape, torch.inf, device=device))
        self.register_buffer("maximum", torch.full(shape, -torch.inf, device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Observe, round, or both, as the state and the mode say."""
        if self.state is State.OBSERVE or self.training:
            self.observe(input)
        if self.state is State.OBSERVE or not self.ready:
            return input
        wide, scale = input.float(), self.scale.float()
        if self.axis is None:
            rounded = torch.fake_quantize_per_tensor_affine(wide, scale, self.zero_point, self.low, self.high)
        else:
            rounded = torch.fake_quantize_per_channel_affine(
                wide, scale, self.zero_point, self.axis, self.low, self.high
            )
        return rounded.to(input.dtype)

    @torch.no_grad()
    def observe(self, input: torch.Tensor) -> None:
        """Take the range of `input` into account. NaN is not a range and is left out of it."""
        if input.numel() == 0:
            return
        wide = input.detach().float()
        if self.axis is None:
            low, high = torch.aminmax(wide)
        else:
            low, high = torch.aminmax(wide.movedim(self.axis, 0).flatten(1), dim=1)
        if self.observer == "ema" and self.ready:
            low, high = self.minimum.lerp(low, 0.1), self.maximum.lerp(high, 0.1)
        elif self.observer == "minmax":
            low, high = torch.fmin(self.minimum, low), torch.fmax(self.maximum, high)
        self.minimum.copy_(torch.where(low.isfinite(), low, self.minimum))
        self.maximum.copy_(torch.where(high.isfinite(), high, self.maximum))
        self._choose_scale()
        self.ready = self.ready or self._observed()

    def reset(self) -> None:
        """Forget all that was observed."""
        self.minimum.fill_(torch.inf)
        self.maximum.fill_(-torch.inf)
        self.scale.fill_(1)
        self.zero_point.zero_()
        self.ready = False

    def _choose_scale(self) -> None:
        # The range always holds 0.0, so that zeros (padding, ReLU) stay exact.
        low = self.minimum.clamp(max=0).nan_to_num(neginf=0.0, posinf=0.0)
        high = self.maximum.clamp(min=0).nan_to_num(neginf=0.0, posinf=0.0)
        smallest = torch.finfo(torch.float32).eps
        if self.symmetric:
            self.scale.copy_((torch.maximum(-low, high) / self.high).clamp(min=smallest))
            return
        self.scale.copy_(((high - low) / (self.high - self.low)).clamp(min=smallest))
        self.zero_point.copy_((self.low - (low / self.scale).round()).clamp(self.low, self.high))

    def _observed(self) -> bool:
        return bool(self.minimum.isfinite().all() and self.maximum.isfinite().all())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.ready = self._observed()

    def extra_repr(self) -> str:
        """Options and state."""
        kind = "symmetric" if self.symmetric else "affine"
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        state = self.state.value if self.ready else f"{self.state.value}, nothing observed yet"
        return f"bits={self.bits}, {kind}, {where}, observer={self.observer!r}, {state}"
