"""One form for all ways in which the arguments of a call may be written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any]]


class OneForm:
    """Gives by position what can be, and defaults for what is left out.

    Args:
        function: whose parameters are meant.
    """

    def __init__(self, function: Callable[..., Any]):
        self._parameters = inspect.signature(function)
        self._known: dict[tuple[int | str, ...], Call] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of a call in that form.

        Raises:
            TypeError: where the function takes no such call, with Python's own reason.
        """
        # To bind takes as long as a small layer, and calls are written in one or two ways.
        written: tuple[int | str, ...] = (len(args), *kwargs)
        if written not in self._known:
            self._known[written] = self._places(len(args), kwargs)
        places, named = self._known[written]
        given = (*args, *kwargs.values())
        return (
            tuple([given[place.index] if type(place) is _Place else place for place in places]),
            {name: given[place.index] if type(place) is _Place else place for name, place in named.items()},
        )

    def _places(self, positional: int, names: Mapping[str, Any]) -> Call:
        """That form with a place for each argument that is given."""
        places = [_Place(index) for index in range(positional + len(names))]
        bound = self._parameters.bind(*places[:positional], **dict(zip(names, places[positional:], strict=True)))
        bound.apply_defaults()
        return bound.args, bound.kwargs


@dataclass(frozen=True)
class _Place:
    """Where an argument stands among those given."""

    index: int
