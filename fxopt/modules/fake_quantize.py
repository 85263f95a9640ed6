"""Rounds a tensor to the values that an integer could hold, while it stays a float and trains."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.distributed as dist
from torch import nn

from fxopt.modules import histogram

Observer = Literal["minmax", "ema", "current", "histogram", "mse", "percentile"]
_FOLLOW = ("minmax", "ema", "current")
_SMALLEST = torch.finfo(torch.float32).eps
_OFF_TIES = 2.0**-20
"""By which a step is longer than the range asks for. Values of a coarse grid, as the gray of images, may lie halfway
between two steps, where the last bit of a runtime's arithmetic would decide; so all round them towards zero."""
_BYTE, _NARROW = 8, 7


class State(enum.Enum):
    """What a `FakeQuantize` does with what it is given."""

    OBSERVE = "observe"
    """In training mode its range widens to hold it; passes it on as it is."""
    QUANTIZE = "quantize"
    """Rounds it; in training mode the range follows first, in evaluation mode it never moves."""
    FROZEN = "frozen"
    """Rounds it; the range never moves."""


_PHASES = tuple(State)


class FakeQuantize(nn.Module):
    """q = clamp(round(x / scale) + zero_point, low, high);  y = (q - zero_point) * scale

    The gradient of y is that of x inside the range and zero outside (straight-through; Jacob et al. 2018). A
    learned scale has the gradient of LSQ, damped by 1 / sqrt(count high) (Esser et al. 2020). It always works in
    float32, under autocast too, and gives back the dtype that it was given. While it has not observed anything
    it passes its input on unchanged. In training with several processes their ranges are joined, so all must
    reach it.

    Args:
        bits: width of the integer, 2 to 8, or 16.
        symmetric: signed integers around a zero point of 0, scale = max|x| / (2^(bits-1) - 1); else unsigned
            ones, whose zero point is where 0.0 falls, scale = (max - min) / (2^bits - 1), plus a millionth.
        axis: the dimension that has a range for each index; None for one range for the whole tensor.
        channels: length of `axis`.
        observer: what the range is: `minmax`, the union of all that was seen; `ema`, an exponential moving
            average of each batch's range with weight 0.1; `current`, that of the tensor at hand (for weights).
            From a histogram, of the whole tensor and only while observing: `histogram`, the least divergence of what
            has no larger squared error than `minmax`; `mse`, the least squared error; `percentile`, all but 0.01 % of
            the values.
        learned: the scale is a parameter; observing gives its first value only.
        device: where the buffers live.

    Attributes:
        scale, zero_point, minimum, maximum: buffers; 0-d, or one value a channel. A learned scale is a parameter.
        phase: buffer; the state, so that a state_dict holds it.
        ready: whether anything was observed.
        calibrating: whether it observes in evaluation mode too.
        unbounded: whether NaN or Inf reached it while it was calibrating.
    """

    stays_whole: ClassVar[bool] = True

    scale: torch.Tensor
    zero_point: torch.Tensor
    minimum: torch.Tensor
    maximum: torch.Tensor
    counts: torch.Tensor
    phase: torch.Tensor

    def __init__(
        self,
        bits: int = 8,
        *,
        symmetric: bool = False,
        axis: int | None = None,
        channels: int = 1,
        observer: Observer = "minmax",
        learned: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if bits not in (*range(2, 9), 16):
            raise ValueError(f"bits: expected 2 to 8, or 16, got {bits}")
        if observer not in get_args(Observer):
            raise ValueError(f"observer: expected one of {', '.join(get_args(Observer))}, got {observer!r}")
        if observer not in _FOLLOW and axis is not None:
            raise ValueError(f"observer: {observer!r} takes one range of a whole tensor, and 'axis' asks for more")
        self.bits = bits
        self.symmetric = symmetric
        self.axis = axis
        self.observer = observer
        self.learned = learned
        self.low = -(2 ** (bits - 1)) if symmetric else 0
        self.high = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        self.ready = self.calibrating = self.unbounded = False
        shape = () if axis is None else (channels,)
        scale = torch.ones(shape, device=device)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32, device=device))
        self.register_buffer("minimum", torch.full(shape, torch.inf, device=device))
        self.register_buffer("maximum", torch.full(shape, -torch.inf, device=device))
        self.register_buffer("phase", torch.zeros((), dtype=torch.uint8, device=device))
        if observer not in _FOLLOW:
            self.register_buffer("counts", torch.zeros(histogram.BINS, device=device))
        self.state = State.QUANTIZE

    @property
    def state(self) -> State:
        """What it does with what it is given."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self.phase.fill_(_PHASES.index(state))

    @property
    def follows(self) -> bool:
        """Whether the range moves with what it is given in training."""
        if self.state is not State.QUANTIZE:
            return self.state is State.OBSERVE
        return not self.ready or (self.observer in _FOLLOW and not self.learned)

    @property
    def rounds(self) -> bool:
        """Whether it rounds what it is given."""
        return self.ready and self.state is not State.OBSERVE

    @property
    def step(self) -> torch.Tensor:
        """The scale that it rounds with: training may leave a learned one negative, or too small to divide by."""
        step: torch.Tensor = self.scale.detach().float().abs().clamp(min=_SMALLEST)
        return step

    @property
    def step_of_bytes(self) -> torch.Tensor:
        """The same for its integers as runtimes hold them: narrower ones as multiples, `spread` times as large."""
        return self.step / self.spread

    @property
    def spread(self) -> int:
        """By what its integers are multiplied in bytes.

        Kernels round a bias to steps of weight times input, so narrow integers use what a byte has; but for its last
        bit: in 7 bits the sum of two products stays within 16, see `fxopt.engines.saturation`.
        """
        return 1 if self.bits >= _BYTE else 2 ** (_NARROW - self.bits)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Observe, round, or both, as the state and the mode say."""
        if (self.training or self.calibrating) and self.follows:
            self.observe(input)
        if not self.rounds:
            return input
        wide, scale = input.float(), self.scale.float()
        if self.learned:
            rounded = self._rounded_by_learned(wide, scale)
        elif self.axis is None:
            rounded = torch.fake_quantize_per_tensor_affine(wide, scale, self.zero_point, self.low, self.high)
        else:
            rounded = torch.fake_quantize_per_channel_affine(
                wide, scale, self.zero_point, self.axis, self.low, self.high
            )
        return rounded.to(input.dtype)

    def _rounded_by_learned(self, wide: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        count = max(1, wide.numel()) / max(1, scale.numel())
        damping = (count * self.high) ** -0.5
        scale = scale.abs().clamp(min=_SMALLEST)
        # In these steps every value is that of torch's operators, bit by bit: freezing moves none over a tie.
        scale = scale.detach() + (scale - scale.detach()) * damping
        scale, zero = self._along(scale, wide), self._along(self.zero_point, wide)
        place = (wide * scale.reciprocal()).clamp(self.low - zero, self.high - zero)
        return (place + (place.round() - place).detach()) * scale

    def _along(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if self.axis is None:
            return value
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return value.reshape(shape)

    @torch.no_grad()
    def observe(self, input: torch.Tensor) -> None:
        """Take the range of `input` into account. NaN is not a range and is left out of it."""
        joined = self.training and self.observer != "current" and dist.is_available() and dist.is_initialized()
        if input.numel() == 0 and not joined:
            return
        wide = input.detach().float()
        if input.numel() == 0:  # the other processes wait for this one
            low = torch.full_like(self.minimum, torch.inf, dtype=torch.float32)
            high = -low
        elif self.axis is None:
            low, high = torch.aminmax(wide)
        else:
            low, high = torch.aminmax(wide.movedim(self.axis, 0).flatten(1), dim=1)
        if joined:
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        if self.calibrating and not bool((low.isfinite() & high.isfinite()).all()):
            self.unbounded = True
        if self.observer == "ema" and self.ready:
            low, high = self.minimum.float().lerp(low, 0.1), self.maximum.float().lerp(high, 0.1)
        elif self.observer not in ("current", "ema"):
            low, high = torch.fmin(self.minimum, low), torch.fmax(self.maximum, high)
        low = torch.where(low.isfinite(), low, self.minimum)
        high = torch.where(high.isfinite(), high, self.maximum)
        if self.observer not in _FOLLOW:
            self._count(wide, low, high, joined)
        self.minimum.copy_(low)
        self.maximum.copy_(high)
        # A compiled graph can't ask for values; whoever compiles has calibrated before.
        self.ready = self.ready or torch.compiler.is_compiling() or self._observed()
        self._choose_scale()

    def reset(self) -> None:
        """Forget all that was observed."""
        self.minimum.fill_(torch.inf)
        self.maximum.fill_(-torch.inf)
        if self.observer not in _FOLLOW:
            self.counts.zero_()
        with torch.no_grad():
            self.scale.fill_(1)
        self.zero_point.zero_()
        self.ready = self.unbounded = False

    def _count(self, wide: torch.Tensor, low: torch.Tensor, high: torch.Tensor, joined: bool) -> None:
        """Take the values into the histogram, which `low` and `high` bound from now on."""
        if not bool(low.isfinite() & high.isfinite()):
            return
        before = self.counts
        if self._observed():
            before = histogram.widened(before, self.minimum, self.maximum, low, high)
        taken = wide.isfinite()
        if self.observer == "histogram":
            # Every range holds 0.0 exactly, but the zeros of a ReLU outweigh the rest where levels are told apart.
            taken &= wide != 0
        found = histogram.counted(wide[taken], low, high)
        if joined:
            dist.all_reduce(found)
        self.counts.copy_(before + found)

    @torch.no_grad()
    def _choose_scale(self) -> None:
        # The range always holds 0.0, so that zeros (padding, ReLU) stay exact.
        low, high = self._range()
        low = low.clamp(max=0).nan_to_num(neginf=0.0, posinf=0.0)
        high = high.clamp(min=0).nan_to_num(neginf=0.0, posinf=0.0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.high
            largest = scale.amax()
            # Kernels hold biases in steps of weight times input, and those of a channel that is nothing beside the
            # others would overflow 32 bits. It takes the others' step, in which it is zero.
            dead = (scale < _SMALLEST) & (scale < largest / (2 * self.high))
            self.scale.copy_(torch.where(dead, largest, scale).clamp(min=_SMALLEST))
            return
        self.scale.copy_(((1 + _OFF_TIES) * (high - low) / (self.high - self.low)).clamp(min=_SMALLEST))
        self.zero_point.copy_((self.low - (low / self.scale).round()).clamp(self.low, self.high))

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.minimum, self.maximum
        # While observing, the next batch may change the choice: it is made once, when that ends.
        if self.observer in _FOLLOW or self.state is State.OBSERVE or not self._observed():
            return low, high
        if self.observer == "percentile":
            return histogram.percentile_range(self.counts, low, high)
        choose = histogram.least_squares_range if self.observer == "mse" else histogram.least_divergence_range
        return choose(self.counts, low, high, self.high - self.low, self.symmetric)

    def settle(self) -> None:
        """Observing has ended: choose the scale by all that was observed, and quantise from now on."""
        self.state = State.QUANTIZE
        if self.ready:
            self._choose_scale()

    def _observed(self) -> bool:
        return bool(self.minimum.isfinite().all() and self.maximum.isfinite().all())

    def train(self, mode: bool = True) -> Self:
        """Besides, take up what was copied into the buffers alone, as averages of weights are."""
        super().train(mode)
        if not self.rounds:
            self._read_buffers()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._read_buffers()

    def _read_buffers(self) -> None:
        self.ready = self._observed()
        self._state = _PHASES[int(self.phase)]

    def extra_repr(self) -> str:
        """Options and state."""
        kind = "symmetric" if self.symmetric else "affine"
        where = "per tensor" if self.axis is None else f"per channel of axis {self.axis}"
        state = self.state.value if self.ready else f"{self.state.value}, nothing observed yet"
        learned = ", learned" if self.learned else ""
        return f"bits={self.bits}, {kind}, {where}, observer={self.observer!r}{learned}, {state}"


def is_quantized(module: nn.Module) -> bool:
    """Whether a quantiser is in it."""
    return any(isinstance(child, FakeQuantize) for child in module.modules())


@contextmanager
def without_rounding(module: nn.Module) -> Iterator[None]:
    """Let all quantisers in `module` pass on what they are given, and observe nothing."""
    quantizers = [child for child in module.modules() if isinstance(child, FakeQuantize)]
    ready = [quantizer.ready for quantizer in quantizers]
    for quantizer in quantizers:
        assert quantizer.state is not State.OBSERVE
        quantizer.ready = False
    try:
        yield
    finally:
        for quantizer, was in zip(quantizers, ready, strict=True):
            quantizer.ready = was
