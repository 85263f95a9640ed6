"""Modules that ask whether they are being exported.

Libraries guard checks that need the values of an input, such as a warning about padding, with
`torch.compiler.is_exporting()`, so that exporters get past them. Capture answers no, since the user's eager
path is what it is held to. Only where that path can't be recorded does it ask again with yes, and takes what
it then gets if the outputs are the same. That it is compiled as well is said last: then modules compute otherwise
too, as transformers' mixtures of experts call no grouped product. Compilers leave out the checks of
`torch.distributions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fxopt.capture.interception import ONE_AT_A_TIME, replaced


@contextmanager
def exporting(*, compiling: bool) -> Iterator[list[bool]]:
    """Answer yes to who asks torch whether it is exporting, and `compiling` to who asks whether it is compiling.

    Gives what was answered to the latter.
    """
    answers: list[bool] = []

    def is_compiling() -> bool:
        answers.append(compiling)
        return compiling

    with ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(replaced(torch.compiler, "is_exporting", lambda: True))
        stack.enter_context(replaced(torch.compiler, "is_compiling", is_compiling))
        stack.enter_context(replaced(torch.distributions.Distribution, "_validate_args", False))
        yield answers
