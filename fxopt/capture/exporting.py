"""Modules that ask whether they are being exported.

Libraries guard checks that need the values of an input, such as a warning about padding, with
`torch.compiler.is_exporting()`, so that exporters get past them. Capture answers no, since the user's eager
path is what it is held to. Only where that path can't be recorded does it ask again with yes, and takes what
it then gets if the outputs are the same. Compilers leave out the checks of `torch.distributions` too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from fxopt.capture.interception import ONE_AT_A_TIME, replaced
from fxopt.nested import tensors_in


@contextmanager
def exporting() -> Iterator[None]:
    """Answer yes to who asks torch whether it is exporting or compiling."""
    with ONE_AT_A_TIME, ExitStack() as stack:
        for question in ("is_exporting", "is_compiling"):
            stack.enter_context(replaced(torch.compiler, question, lambda: True))
        stack.enter_context(replaced(torch.distributions.Distribution, "_validate_args", False))
        yield


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same tensors in the same order."""
    left, right = list(tensors_in(one)), list(tensors_in(other))
    return len(left) == len(right) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(torch.isclose(a.detach(), b.detach(), 0.0, 0.0, equal_nan=True).all())
        for a, b in zip(left, right, strict=True)
    )
