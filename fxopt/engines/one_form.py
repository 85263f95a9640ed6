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
        self._known: dict[tuple[int | str, ...], Call | None] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of a call in that form; as they are where the function takes no such call."""
        # To bind takes as long as a small layer, and calls are written in one or two ways.
        written: tuple[int | str, ...] = (len(args), *kwargs)
        if written not in self._known:
            self._known[written] = self._places(len(args), kwargs)
        places = self._known[written]
        if places is None:
            return args, dict(kwargs)
        given = (*args, *kwargs.values())
        return (
            tuple([given[place.index] if type(place) is _Place else place for place in places[0]]),
            {name: given[place.index] if type(place) is _Place else place for name, place in places[1].items()},
        )

    def _places(self, positional: int, names: Mapping[str, Any]) -> Call | None:
        """That form with a place for each argument that is given."""
        places = [_Place(index) for index in range(positional + len(names))]
        try:
            bound = self._parameters.bind(*places[:positional], **dict(zip(names, places[positional:], strict=True)))
        except TypeError:
            return None
        bound.apply_defaults()
        return bound.args, bound.kwargs


@dataclass(frozen=True)
class _Place:
    """Where an argument stands among those given."""

    index: int
