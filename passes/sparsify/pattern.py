"""Which weights are removed together: single ones, n of each m, blocks, rows or columns.

A weight is seen as (outputs, taps, inputs), whatever its layer. A unit is what is kept or removed as one; its
score is the mean over its weights.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from fxopt.errors import SpecError

_KINDS = "element, 2:4 (any n:m), block4x1 (any block), row, or column"


@dataclass(frozen=True)
class Pattern:
    """A granularity.

    Attributes:
        kind: `element`, `n:m`, `block`, `row` or `column`.
        first: n, or the outputs of a block.
        second: m, or the inputs of a block.
    """

    kind: str
    first: int = 1
    second: int = 1

    @staticmethod
    def parse(text: str) -> Pattern:
        """The pattern that a spec means.

        Raises:
            SpecError: it means none.
        """
        if text in ("element", "row", "column"):
            return Pattern(text)
        ratio, block = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"block(\d+)x(\d+)", text)
        if ratio and 0 < int(ratio[1]) < int(ratio[2]):
            return Pattern("n:m", int(ratio[1]), int(ratio[2]))
        if ratio:
            raise SpecError(f"sparsify: '{text}' keeps {ratio[1]} of {ratio[2]}: expected n:m with 0 < n < m, like 2:4")
        if block and int(block[1]) * int(block[2]) > 1:
            return Pattern("block", int(block[1]), int(block[2]))
        raise SpecError(f"sparsify: 'granularity' is {_KINDS}, not '{text}'")

    def __str__(self) -> str:
        texts = {"n:m": f"{self.first}:{self.second}", "block": f"block{self.first}x{self.second}"}
        return texts.get(self.kind, self.kind)

    def why_not(self, weight: torch.Tensor, outputs: int) -> str | None:
        """What keeps a weight from having this pattern; None if nothing does."""
        rows, taps, inputs = view(weight, outputs).shape
        if self.kind == "n:m" and inputs % self.second:
            return f"it has {inputs} inputs a group: {self} needs a multiple of {self.second}"
        if self.kind == "block" and (rows % self.first or (taps * inputs) % self.second):
            return f"it is {rows}x{taps * inputs}: {self} needs multiples of {self.first} and {self.second}"
        if self.kind in ("row", "column") and (rows if self.kind == "row" else inputs) < 2:
            return f"it has a single {self.kind}, which has to stay"
        return None

    def unit_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """The score of each unit, from those of the weights as (outputs, taps, inputs); flat but for n:m."""
        rows, taps, inputs = scores.shape
        if self.kind == "n:m":
            return scores.reshape(-1, self.second)
        if self.kind == "block":
            parts = scores.reshape(rows // self.first, self.first, taps * inputs // self.second, self.second)
            return parts.mean((1, 3)).flatten()
        if self.kind == "row":
            return scores.mean((1, 2))
        if self.kind == "column":
            return scores.mean((0, 1))
        return scores.flatten()

    def expand(self, kept: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The mask, as (outputs, taps, inputs), of the units that are kept."""
        rows, taps, inputs = shape
        if self.kind == "block":
            parts = kept.reshape(rows // self.first, 1, taps * inputs // self.second, 1)
            return parts.expand(-1, self.first, -1, self.second).reshape(shape)
        if self.kind == "row":
            return kept.reshape(rows, 1, 1).expand(shape)
        if self.kind == "column":
            return kept.reshape(1, 1, inputs).expand(shape)
        return kept.reshape(shape)

    def weights_per_unit(self, shape: torch.Size) -> int:
        """How many weights go with one unit."""
        rows, taps, inputs = shape
        return {"block": self.first * self.second, "row": taps * inputs, "column": rows * taps}.get(self.kind, 1)

    def kept_of_each(self, amount: float) -> int:
        """Of each m, how many are kept on the way to n while `amount` of the weights is removed."""
        return max(self.first, self.second - math.floor(amount * self.second + 1e-6))


def view(weight: torch.Tensor, outputs: int) -> torch.Tensor:
    """A weight, whose axis `outputs` counts outputs and whose other first axis inputs, as (outputs, taps, inputs)."""
    moved = weight.movedim(outputs, 0)
    return moved.reshape(*moved.shape[:2], -1).transpose(1, 2)


def unview(viewed: torch.Tensor, shape: torch.Size, outputs: int) -> torch.Tensor:
    """The inverse of `view`, for a weight of this shape."""
    moved = torch.empty(shape, device="meta").movedim(outputs, 0).shape
    return viewed.transpose(1, 2).reshape(moved).movedim(0, outputs).contiguous()
