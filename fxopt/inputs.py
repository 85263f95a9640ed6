"""The inputs of a model: what the user gave, fresh random ones like them, and other batch sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import LoadError
from fxopt.nested import flatten, is_object, tensors_in, with_tensors


@dataclass(frozen=True, repr=False)
class Inputs:
    """Positional and keyword arguments of one call of a model.

    Attributes:
        args: positional arguments; tensors may sit anywhere in nested lists, tuples, dicts and objects.
        kwargs: keyword arguments, likewise.
        static: names of keyword arguments, and positions of others, by whose values Python code may decide, as it may
            by sizes: capture guards what it decides, and `fresh` and `with_batch` leave them as they are.

    Raises:
        LoadError: `static` is no list, or names an argument that is not there.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    static: Collection[str | int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.static, (str, int)):
            raise LoadError(f"inputs: static takes a list of arguments, such as [{self.static!r}], not {self.static!r}")
        unknown = [key for key in self.static if key not in self.kwargs and key not in range(len(self.args))]
        if unknown:
            known = ", ".join(map(repr, (*range(len(self.args)), *self.kwargs))) or "none"
            raise LoadError(f"inputs: static names {unknown[0]!r}, which is no argument: there are {known}")

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """Read what a user may give: a tensor, a tuple of positional arguments, a dict of keyword ones.

        Raises:
            LoadError: for anything else, or a dict whose keys are not names.
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, torch.Tensor):
            return cls((value,))
        if isinstance(value, (tuple, list)):
            return cls(tuple(value))
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise LoadError(f"inputs: the keys of a dict are argument names, not {list(value)!r}")
            return cls((), dict(value))
        raise LoadError(
            f"inputs: expected a tensor, a tuple (positional) or a dict (keyword arguments), got {type(value).__name__}"
        )

    def __repr__(self) -> str:
        return f"Inputs({self.describe()})"

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in order."""
        return list(tensors_in((self.args, dict(self.kwargs))))

    @property
    def static_tensors(self) -> list[torch.Tensor]:
        """Those of `static` arguments."""
        return list(tensors_in([self.kwargs[key] if isinstance(key, str) else self.args[key] for key in self.static]))

    @property
    def objects(self) -> list[Any]:
        """The objects among them that a call may change, such as a cache."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if is_object(leaf)]

    @property
    def batch_size(self) -> int | None:
        """The length of dimension 0 where all tensors that have dimensions, and may change, agree on it, else None."""
        fixed = {id(tensor) for tensor in self.static_tensors}
        sizes = {tensor.shape[0] for tensor in self.tensors if tensor.dim() > 0 and id(tensor) not in fixed}
        return sizes.pop() if len(sizes) == 1 else None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same structure with each tensor changed, and a copy of each object."""
        args, kwargs = with_tensors((self.args, dict(self.kwargs)), change)
        return Inputs(args, kwargs, self.static)

    def _vary(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same with each tensor changed that is in no static argument."""
        fixed = {id(tensor) for tensor in self.static_tensors}
        return self.map(lambda tensor: tensor if id(tensor) in fixed else change(tensor))

    def call(self, function: Callable[..., Any]) -> Any:
        """Call a function with them, with a copy of each object, since a call may change it."""
        given = self.map(lambda tensor: tensor) if self.objects else self
        return function(*given.args, **given.kwargs)

    def flatten_with(self, output: Any) -> tuple[list[Any], Any]:
        """All values of what a call with them gave, and of what it left in the objects among them; see `flatten`."""
        return flatten([output, self.objects]) if self.objects else flatten(output)

    def to(self, device: torch.device | str) -> Inputs:
        """All tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def double(self) -> Inputs:
        """Floating-point tensors as float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def fresh(self, seed: int) -> Inputs:
        """Random inputs of the same shapes, dtypes and value ranges.

        Floats, and either part of complex numbers, are normal with the mean and deviation of the example; what is not
        finite in it, as in a mask, stays where it is. Integers lie within the example's own smallest and largest value,
        since they mostly index something; booleans keep the share of True.
        """
        generator = torch.Generator().manual_seed(seed)
        return self._vary(lambda tensor: _fresh(tensor, generator))

    def with_batch(self, size: int) -> Inputs | None:
        """The same inputs at another batch size, rows repeated; None where there is no common batch."""
        batch = self.batch_size
        if not batch:
            return None
        rows = torch.arange(size) % batch
        return self._vary(lambda t: _rows(t, rows.to(t.device)) if t.dim() > 0 else t)

    def describe(self) -> str:
        """`1x3x224x224 float32`, joined by commas; with names of keyword inputs, what objects hold, and `static`.

        It is the same in another process.
        """
        given: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        parts = [
            f"{f'{key}=' if isinstance(key, str) else ''}{_describe(value)}{' static' if key in self.static else ''}"
            for key, value in given
        ]
        return ", ".join(parts)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(item)}" for key, item in value.items()) + "}"
    if is_object(value):
        return f"{type(value).__name__}({', '.join(map(_describe, tensors_in(value)))})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """These rows of a tensor: `index_select` knows no unsigned integers as wide as 16 bits, an index nothing sparse."""
    return tensor[rows] if tensor.layout is torch.strided else tensor.index_select(0, rows)


def _fresh(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.numel() == 0:
        return tensor.clone()
    if tensor.dtype is torch.bool:
        share = tensor.double().mean().item()
        return (torch.rand(tensor.shape, generator=generator) < share).to(tensor.device)
    if tensor.is_complex():
        return torch.complex(_fresh(tensor.real, generator), _fresh(tensor.imag, generator))
    if tensor.is_floating_point():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        wide = tensor.detach().double().cpu()
        known = wide.isfinite()
        if not known.any():
            return tensor.clone()
        deviation, mean = wide[known].std(correction=0), wide[known].mean()
        spread = deviation if deviation > 0 else torch.ones(())
        drawn = (noise * spread + mean).to(tensor.dtype).to(tensor.device)
        return torch.where(known.to(tensor.device), drawn, tensor.detach())
    whole = tensor.detach().to(torch.int64)  # of unsigned integers as wide as 16 bits torch knows no smallest one
    low, high, largest = int(whole.min()), int(whole.max()), torch.iinfo(torch.int64).max
    if low == largest:
        return tensor.clone()
    integers = torch.randint(low, min(high, largest - 1) + 1, tensor.shape, generator=generator)  # never the largest
    return integers.to(tensor.dtype).to(tensor.device)
