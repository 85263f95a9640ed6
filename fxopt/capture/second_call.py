"""Whether what a first call leaves behind matters to the calls after it."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState
from fxopt.capture.same import difference
from fxopt.capture.state import State


def second_call(
    root: nn.Module, call: Call, output: Any, state: State, began: RandomState
) -> tuple[list[tuple[nn.Module, str]], bool]:
    """Call `root` once more, with the attributes that a first call has left, and with the tensors of before.

    A cache is filled once and changes nothing; a counter, a state or a first call that is special do.

    Args:
        root: as the first call left it.
        call: the example.
        output: what the first call gave.
        state: of `root`, as it was before the first call.
        began: the random state that the first call began with.

    Returns:
        The attributes that change with this call too, and whether it gives or writes something else.

    Raises:
        Exception: what the forward of `root` raises.
    """
    written = state.written()
    state.restore_tensors()
    after = State(root)
    began.restore()
    found = call.run(root)
    return after.changed(by_value=True), difference(output, found) is not None or after.written() != written
