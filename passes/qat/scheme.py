"""How wide, how signed and by which range: what a spec's options say of quantisers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast, get_args

import torch

from fxopt.errors import SpecError
from fxopt.modules import FakeQuantize, Observer

_BITS = (*range(2, 9), 16)
_OBSERVERS = tuple(name for name in get_args(Observer) if name != "current")


@dataclass(frozen=True)
class Scheme:
    """The quantisers that a pass puts in.

    Attributes:
        weight_bits: of signed, symmetric weights.
        activation_bits: of inputs; None where they stay floats.
        signed: whether inputs are signed and symmetric.
        per_channel: a scale for each output channel of a weight.
        observer: of inputs.
        learned: whether scales are parameters.
    """

    weight_bits: int
    activation_bits: int | None
    signed: bool
    per_channel: bool
    observer: Observer
    learned: bool = False

    @staticmethod
    def of(
        name: str,
        *,
        bits: int,
        weights: str,
        activations: str,
        per_channel: bool,
        observer: str,
    ) -> Scheme:
        """The scheme that options name.

        Raises:
            SpecError: for a width or an observer that there is not, in the name of the pass.
        """
        if bits not in _BITS:
            raise SpecError(f"{name}: 'bits' is 2 to 8, or 16, not {bits!r}")
        if observer not in _OBSERVERS:
            raise SpecError(f"{name}: 'observer' is one of {', '.join(_OBSERVERS)}, not {observer!r}")
        weight = re.fullmatch(r"int(\d+)", weights or f"int{bits}")
        if weight is None or int(weight[1]) not in _BITS:
            raise SpecError(f"{name}: 'weights' is int2 to int8, or int16, not {weights!r}")
        value = re.fullmatch(r"(u?)int(\d+)|none", activations or f"uint{bits}")
        if value is None or (value[2] is not None and int(value[2]) not in _BITS):
            raise SpecError(f"{name}: 'activations' is uint2 to uint8, int2 to int8, 16 or none, not {activations!r}")
        return Scheme(
            int(weight[1]),
            None if value[2] is None else int(value[2]),
            value[1] == "",
            per_channel,
            cast("Observer", observer),
        )

    def for_weight(self, channel_axis: int | None, weight: torch.Tensor) -> FakeQuantize:
        """A quantiser that knows the range of `weight`, which has no axis of channels where that is None."""
        axis = channel_axis if self.per_channel else None
        made = FakeQuantize(
            self.weight_bits,
            symmetric=True,
            axis=axis,
            channels=1 if axis is None else weight.shape[axis],
            observer="current",
            learned=self.learned,
            device=weight.device,
        )
        made.observe(weight)
        return made

    def for_value(self, like: torch.Tensor) -> FakeQuantize:
        """A quantiser that has yet to observe, on the device of `like`."""
        assert self.activation_bits is not None
        return FakeQuantize(
            self.activation_bits,
            symmetric=self.signed,
            observer=self.observer,
            learned=self.learned,
            device=like.device,
        )

    def what(self, weight: bool, value: bool) -> str:
        """Words for a report: which of the two were quantised."""
        return " and ".join(
            f"{part} fake-quantised to {bits} bits"
            for part, bits, done in (("weight", self.weight_bits, weight), ("input", self.activation_bits, value))
            if done
        )
