"""One option: from its text to a value of the field's type, and back."""

from __future__ import annotations

import collections.abc
import difflib
import enum
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Union

from fxopt.errors import PassError
from fxopt.spec.grammar import Items, Table, Value, Word, quote

_SEQUENCES: tuple[Any, ...] = (tuple, list, set, frozenset, collections.abc.Sequence)
_MAPPINGS: tuple[Any, ...] = (dict, collections.abc.Mapping)


class Mismatch(Exception):
    """A value does not fit a type; `at` is the part that doesn't, `expected` says what would."""

    def __init__(self, at: Value, expected: str, hint: str = ""):
        super().__init__(expected)
        self.at = at
        self.expected = expected
        self.hint = hint


def coerce(value: Value, annotation: Any) -> Any:
    """The value that the text means where a field of type `annotation` is to be filled.

    Raises:
        Mismatch: where it can't mean one.
        PassError: where a field has a type that no text can fill.
    """
    origin, arguments = _origin(annotation)
    if origin is Union:
        return _union(value, arguments)
    if origin is Literal:
        return _choice(value, {_choice_text(item): item for item in arguments})
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return _choice(value, {_choice_text(item): item for item in origin})
    if origin in _SEQUENCES:
        return _sequence(value, origin, arguments)
    if origin in _MAPPINGS:
        if not isinstance(value, Table):
            raise Mismatch(value, type_name(annotation))
        key_type, value_type = arguments or (str, str)
        return {coerce(key, key_type): coerce(item, value_type) for key, item in value.entries}
    read = _SCALARS.get(origin)
    if read is None:
        raise PassError(f"an option of type {annotation!r} cannot be written in a spec")
    if not isinstance(value, Word) or (value.quoted and origin is not str):
        raise Mismatch(value, type_name(annotation))
    try:
        found = read(value.value)
    except (ValueError, KeyError):
        raise Mismatch(value, type_name(annotation)) from None
    if isinstance(found, int) and abs(found) >= 2**63:
        raise Mismatch(value, f"{type_name(annotation)} of 64 bits")
    return found


def text_of(value: Any) -> str:
    """The text that `coerce` reads back as `value`."""
    if isinstance(value, enum.Enum):
        return quote(_choice_text(value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, (set, frozenset)):
        return f"[{','.join(sorted(map(text_of, value)))}]"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, collections.abc.Mapping):
        return "{" + ",".join(f"{text_of(key)}={text_of(item)}" for key, item in value.items()) + "}"
    raise PassError(f"the option value {value!r} of type {type(value).__name__} cannot be written in a spec")


def type_name(annotation: Any) -> str:
    """The type in the words of a spec: `int or none`, `int8|int4`, `list of text`."""
    origin, arguments = _origin(annotation)
    if origin is Union:
        return " or ".join(dict.fromkeys(type_name(item) for item in arguments))
    if origin is Literal:
        return "|".join(_choice_text(item) for item in arguments)
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return "|".join(_choice_text(item) for item in origin)
    if origin in _SEQUENCES:
        if _is_variadic(origin, arguments):
            return f"list of {type_name(arguments[0]) if arguments else 'text'}"
        return f"[{','.join(map(type_name, arguments))}]"
    if origin in _MAPPINGS:
        key, item = arguments or (str, str)
        return f"{{{type_name(key)}={type_name(item)},...}}"
    names: dict[Any, str] = {bool: "true|false", int: "int", float: "number", str: "text", type(None): "none"}
    return names.get(origin, str(annotation))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` was probably meant to be."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    starts = [name for name in names if len(name) > 1 and (word.startswith(name) or name.startswith(word))]
    return max(starts, key=len) if word and starts else None


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _none(text: str) -> None:
    return {"none": None}[text.lower()]


_SCALARS: dict[Any, Callable[[str], Any]] = {
    bool: _boolean,
    int: int,
    float: float,
    str: str,
    type(None): _none,
}


def _origin(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and its arguments, with both spellings of a union as one."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _origin(typing.get_args(annotation)[0])
    if origin is types.UnionType:
        origin = Union
    return (annotation if origin is None else origin), typing.get_args(annotation)


def _union(value: Value, members: tuple[Any, ...]) -> Any:
    # Text takes anything, and a lone word may stand for a list of one: both only where nothing else fits.
    def rank(member: Any) -> int:
        origin, _ = _origin(member)
        return 1 if origin is str else 2 if origin in _SEQUENCES and isinstance(value, Word) else 0

    for member in sorted(members, key=rank):
        try:
            return coerce(value, member)
        except Mismatch as mismatch:
            if mismatch.at is not value:
                raise
    raise Mismatch(value, " or ".join(map(type_name, members)))


def _choice(value: Value, choices: dict[str, Any]) -> Any:
    expected = "|".join(choices)
    if not isinstance(value, Word):
        raise Mismatch(value, expected)
    if value.value in choices:
        return choices[value.value]
    near = nearest(value.value, choices)
    raise Mismatch(value, expected, f"did you mean '{near}'?" if near else "")


def _choice_text(item: Any) -> str:
    if isinstance(item, enum.Enum):
        return item.value if isinstance(item.value, str) else item.name
    return str(item).lower() if item is None or isinstance(item, bool) else str(item)


def _sequence(value: Value, origin: Any, arguments: tuple[Any, ...]) -> Any:
    make = tuple if origin is collections.abc.Sequence else origin
    if _is_variadic(origin, arguments):
        item_type = arguments[0] if arguments else str
        values = value.values if isinstance(value, Items) else (value,)
        return make(coerce(item, item_type) for item in values)
    if not isinstance(value, Items) or len(value.values) != len(arguments):
        raise Mismatch(value, f"a list of {len(arguments)}: [{','.join(map(type_name, arguments))}]")
    return make(coerce(item, item_type) for item, item_type in zip(value.values, arguments, strict=True))


def _is_variadic(origin: Any, arguments: tuple[Any, ...]) -> bool:
    return origin is not tuple or not arguments or arguments[-1] is Ellipsis
