"""Shapes whose sizes are traced numbers."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.capture.traced import plain


class TracedSize(tuple):  # type: ignore[type-arg]
    """What `x.shape` gives while a module is recorded: a `torch.Size` to the user's code.

    That class makes plain numbers of what it holds, and can't be subclassed.
    """

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return torch.Size

    def numel(self) -> Any:
        """The product of the sizes."""
        return math.prod(self)

    def plain(self) -> torch.Size:
        """The shape itself, without nodes."""
        return torch.Size(map(plain, self))

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return TracedSize(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return TracedSize((*self, *other)) if isinstance(other, tuple) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return TracedSize((*other, *self)) if isinstance(other, tuple) else NotImplemented

    def __mul__(self, times: Any) -> Any:
        return TracedSize(super().__mul__(times))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"torch.Size({list(self)})"

    def __reduce__(self) -> Any:
        return torch.Size, (tuple(self.plain()),)

    def __deepcopy__(self, memo: Any) -> torch.Size:
        return self.plain()
