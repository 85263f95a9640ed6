"""Tensors that are made by calling a class, which torch's mode does not see: `Variable(x)`, `torch.LongTensor([1])`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.variable import Variable

from fxopt.capture.recorder import Recorder

_TENSOR_TYPE: type = type(torch.FloatTensor)


def constructors(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """What to replace while `recorder` records, as owner, name and value, so that it is told of such calls."""
    new = torch.Tensor.__new__

    def tensor(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is torch.Tensor and is_recording():
            return recorder.__torch_function__(cls, (), args, kwargs)
        return new(cls, *args, **kwargs)

    def variable(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return recorder.__torch_function__(cls, (), args, kwargs)
        return type.__call__(cls, *args, **kwargs)

    yield torch.Tensor, "__new__", tensor
    yield type(Variable), "__call__", variable
    for owner in (torch, torch.sparse):
        for name, kind in list(vars(owner).items()):
            if type(kind) is _TENSOR_TYPE:
                yield owner, name, TensorType(kind, recorder, is_recording)


class TensorType(str):
    """Stands for a class that can't be told to tell of its calls, as `torch.LongTensor`; its name does for all else."""

    kind: Any
    recorder: Recorder
    is_recording: Callable[[], bool]

    def __new__(cls, kind: Any, recorder: Recorder, is_recording: Callable[[], bool]) -> TensorType:
        """Read as the name of `kind`, by which torch's own functions take it."""
        made = super().__new__(cls, f"{kind.__module__}.{kind.__name__}")
        made.kind, made.recorder, made.is_recording = kind, recorder, is_recording
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a tensor, and tell the recorder."""
        if self.is_recording():
            return self.recorder.__torch_function__(self.kind, (), args, kwargs)
        return self.kind(*args, **kwargs)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self.kind)
