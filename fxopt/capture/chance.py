"""All random streams that a forward may draw from: torch's, Python's and numpy's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """The random streams at one moment."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=True)

    def restore(self) -> None:
        """Put all of them back."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def python_drew(self) -> bool:
        """Whether Python's or numpy's own numbers were drawn since: no graph can hold that."""
        _, keys, position, *_ = self._numpy
        _, now_keys, now_position, *_ = np.random.get_state(legacy=True)
        return random.getstate() != self._python or position != now_position or not np.array_equal(keys, now_keys)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random streams as they were."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
