"""Run a captured module on its example and hold it against what was recorded."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState
from fxopt.capture.same import difference
from fxopt.capture.state import State


def replay(module: nn.Module, call: Call, expected: Any) -> str | None:
    """How the outputs of `module`, and the random numbers that it draws, differ from the recorded ones.

    Returns it in words, None where they don't. Leaves the module and the random state as they were.
    """
    state, began = State(module), RandomState()
    try:
        return difference(expected, call.run(module))
    except Exception as error:
        return f"it raises {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    finally:
        state.restore()
        began.restore()
