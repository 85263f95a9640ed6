"""What a pass says of itself: what it does, what it promises, which options it takes."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from fxopt.contract import Pass
from fxopt.errors import PassError
from fxopt.spec.values import text_of, type_name


@dataclass(frozen=True)
class Option:
    """An option of a pass.

    Attributes:
        name: what a spec calls it.
        type: its type, in the words of a spec.
        default: the text of its default; None where it has to be given.
        help: what it is for.
    """

    name: str
    type: str
    default: str | None
    help: str


@dataclass(frozen=True)
class PassDescription:
    """All that a user can know of a pass without reading its source."""

    name: str
    summary: str
    doc: str
    promise: str
    after: tuple[str, ...]
    conflicts: tuple[str, ...]
    options: tuple[Option, ...]


def describe(pass_class: type[Pass]) -> PassDescription:
    """Describe a pass by its docstring, its class variables and its fields."""
    doc = inspect.cleandoc(pass_class.__doc__ or "")
    types = option_types(pass_class)
    options = []
    for field in option_fields(pass_class):
        default = default_of(field)
        options.append(
            Option(
                name=field.name,
                type=type_name(types[field.name]),
                default=None if default is dataclasses.MISSING else text_of(default),
                help=str(field.metadata.get("help", "")),
            )
        )
    return PassDescription(
        name=pass_class.name,
        summary=doc.partition("\n")[0].strip(),
        doc=doc,
        promise=pass_class.promise.value,
        after=tuple(pass_class.after),
        conflicts=tuple(pass_class.conflicts),
        options=tuple(options),
    )


def option_fields(pass_class: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """The fields that are options, in order."""
    return tuple(field for field in dataclasses.fields(pass_class) if field.init)


def option_types(pass_class: type[Any]) -> dict[str, Any]:
    """The types of the options by name."""
    try:
        return typing.get_type_hints(pass_class)
    except NameError as error:
        raise PassError(
            f"the options of pass '{pass_class.name}' have types that cannot be read: {error}; "
            "import them outside of `if TYPE_CHECKING`"
        ) from error


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or `dataclasses.MISSING`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
