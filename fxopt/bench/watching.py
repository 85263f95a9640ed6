"""Modes that watch operators, without what torch imports for them."""

from __future__ import annotations

import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_KEPT = "__dynamo_disable"


class Watch(TorchDispatchMode):
    """A mode whose first operator does not import torch._dynamo, which takes longer than torch itself.

    torch imports it to keep the mode's own code from being compiled, and keeps what that gives as an attribute of the
    function (torch/_compile.py). Where nothing was compiled yet the function itself will do there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        watched: Any = getattr(type(self).__torch_dispatch__, "__wrapped__", None)
        if watched is None:
            return
        if "torch._dynamo" not in sys.modules:
            setattr(watched, _KEPT, watched)
        elif getattr(watched, _KEPT, None) is watched:
            delattr(watched, _KEPT)
