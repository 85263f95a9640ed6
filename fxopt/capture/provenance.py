"""What a value depends on. It decides whether Python code may look at the value while it is recorded."""

from __future__ import annotations

import enum


class Depends(enum.IntEnum):
    """From the weakest to the strongest: a result depends on what its strongest argument does."""

    CONSTANT = 0
    """On parameters and constants only."""
    SHAPE = 1
    """On the shapes of the inputs, or on numbers among them; not on the values of a tensor."""
    DATA = 2
    """On the values of the inputs, or on random numbers: Python code can't be recorded that branches on it."""
