"""`--input 1x3x224x224`, `--input ids=1x128:int64:0..30000` -> Inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt.errors import LoadError
from fxopt.inputs import Inputs

_NAMES = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool".split()
_DTYPES: dict[str, torch.dtype] = {
    **{name: getattr(torch, name) for name in _NAMES},
    "double": torch.float64,
    "float": torch.float32,
    "fp32": torch.float32,
    "half": torch.float16,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
}
_FORM = (
    "expected [name=]SHAPE[:dtype][:low..high], such as 1x3x224x224, or ids=1x128:int64:0..30000 for integers "
    "from 0 up to, but not including, 30000"
)


@dataclass(frozen=True)
class Flag:
    """One `--input`, read.

    Attributes:
        name: of the argument; None for the next positional one.
        shape: of the tensor.
        dtype: None for the floating-point type of the module.
        limits: the values lie from the first up to the second.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    limits: tuple[float, float] | None = None


def read_flag(text: str) -> Flag:
    """Read one `--input`.

    Raises:
        LoadError: where it does not follow the form.
    """
    name, equals, rest = text.rpartition("=")
    if equals and not name.isidentifier():
        raise LoadError(f"--input {text}: '{name}' is not the name of an argument; {_FORM}")
    shape, *further = rest.split(":")
    dtype: torch.dtype | None = None
    limits: tuple[float, float] | None = None
    for part in further:
        if ".." in part and limits is None:
            limits = _limits(text, part)
        elif part in _DTYPES and dtype is None:
            dtype = _DTYPES[part]
        else:
            raise LoadError(f"--input {text}: cannot read '{part}'; {_FORM}; dtypes are {', '.join(_DTYPES)}")
    return Flag(name or None, _shape(text, shape), dtype, limits)


def make_inputs(module: nn.Module, flags: Sequence[Flag]) -> tuple[Inputs, tuple[str, ...]]:
    """Tensors as the flags say, the same ones each time, and what to tell the user."""
    generator = torch.Generator().manual_seed(0)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    notes: list[str] = []
    for flag in flags:
        tensor, drawn = _tensor(module, flag, generator)
        if flag.name is None:
            args.append(tensor)
        elif flag.name in kwargs:
            raise LoadError(f"--input: '{flag.name}' is given twice")
        else:
            kwargs[flag.name] = tensor
        if drawn:
            notes.append(f"inputs: '{flag.name or len(args)}' holds {drawn}; change it by adding :low..high")
    return Inputs(tuple(args), kwargs), tuple(notes)


def _shape(text: str, shape: str) -> tuple[int, ...]:
    if shape == "scalar":
        return ()
    sizes = shape.split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise LoadError(f"--input {text}: '{shape}' is not a shape of positive sizes; {_FORM}")
    return tuple(map(int, sizes))


def _limits(text: str, part: str) -> tuple[float, float]:
    low, _, high = part.partition("..")
    try:
        limits = float(low), float(high)
    except ValueError:
        raise LoadError(f"--input {text}: cannot read the range '{part}'; {_FORM}") from None
    if not limits[0] < limits[1]:
        raise LoadError(f"--input {text}: the range '{part}' is empty; {_FORM}")
    return limits


def _tensor(module: nn.Module, flag: Flag, generator: torch.Generator) -> tuple[torch.Tensor, str]:
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = own.device if own is not None and own.device.type != "meta" else torch.device("cpu")
    dtype = flag.dtype or (own.dtype if own is not None else torch.get_default_dtype())
    drawn = ""
    try:
        if dtype is torch.bool:
            tensor = torch.rand(flag.shape, generator=generator) < 0.5
        elif not dtype.is_floating_point and not dtype.is_complex:
            low, high = flag.limits or (0, min(_indices(module), torch.iinfo(dtype).max))
            if flag.limits is None:
                drawn = f"integers from 0 up to {high}"
            tensor = torch.randint(int(low), max(int(high), int(low) + 1), flag.shape, generator=generator, dtype=dtype)
        elif flag.limits is not None:
            low, high = flag.limits
            tensor = torch.rand(flag.shape, generator=generator, dtype=torch.float64) * (high - low) + low
        else:
            tensor = torch.randn(flag.shape, generator=generator)
        return tensor.to(dtype).to(device), drawn
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        # Out of memory, or a range that the dtype does not hold.
        shape = "x".join(map(str, flag.shape))
        first = str(error).partition("\n")[0]
        raise LoadError(f"--input {shape}: cannot make this tensor: {first}") from error


def _indices(module: nn.Module) -> int:
    """Up to where integers are valid: what the smallest embedding holds, else a few."""
    sizes = [child.num_embeddings for child in module.modules() if isinstance(child, (nn.Embedding, nn.EmbeddingBag))]
    return min(sizes, default=10)
