"""The text of a pipeline <-> a tuple of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt import registry
from fxopt.contract import Pass
from fxopt.errors import PassError, SpecError
from fxopt.spec.describe import default_of, option_fields, option_types
from fxopt.spec.grammar import Call, read
from fxopt.spec.values import Mismatch, coerce, nearest, text_of


def parse(text: str, known: Mapping[str, type[Pass]] | None = None) -> tuple[Pass, ...]:
    """Make the passes that `text` names, with their options.

    Args:
        text: such as `fuse,qat{bits=8,per_channel=true},lora{targets=[*.q,*.v]}`.
        known: the passes by name; all installed ones where not given.

    Raises:
        SpecError: for an unknown pass or option, a value that does not fit, or text that does not follow the
            grammar; the message points at the column and names what was probably meant.
    """
    calls = read(text)
    passes = registry.available() if known is None else known
    return tuple(_make(call, passes) for call in calls)


def render(passes: Sequence[Pass]) -> str:
    """The shortest text that `parse` reads back as `passes`: options that are not the default."""
    return ",".join(map(_render, passes))


def find(name: str, known: Mapping[str, type[Pass]] | None = None) -> type[Pass]:
    """The pass of that name.

    Raises:
        SpecError: where there is none, with the name that was probably meant.
    """
    passes = registry.available() if known is None else known
    if name in passes:
        return passes[name]
    near = nearest(name, passes)
    meant = f"; did you mean '{near}'? `fxopt passes` lists them all" if near else f"; there are {_list(passes)}"
    raise SpecError(f"unknown pass '{name}'{meant}")


def read_options(text: str, known: Mapping[str, type[Any]], kind: str) -> tuple[str, dict[str, Any]]:
    """The name and the options that `text` gives to one thing that is no pass: `openvino{precision=bf16}`.

    Args:
        text: a name that is known, and options in braces.
        known: dataclasses by name; their fields are the options.
        kind: what such a thing is called.

    Raises:
        SpecError: as of `parse`.
    """
    call, *rest = read(text)
    if rest:
        raise rest[0].span.error(f"expected one {kind}")
    return call.name.value, _options(call, known[call.name.value], kind)


def _make(call: Call, known: Mapping[str, type[Pass]]) -> Pass:
    name = call.name.value
    try:
        pass_class = find(name, known)
    except SpecError as error:
        raise call.name.span.error(str(error)) from None
    options = _options(call, pass_class, "pass")
    missing = [
        field.name
        for field in option_fields(pass_class)
        if default_of(field) is dataclasses.MISSING and field.name not in options
    ]
    if missing:
        example = ",".join(f"{option}=..." for option in missing)
        raise call.span.error(f"pass '{name}' needs {_list(missing)}: {name}{{{example}}}")
    try:
        return pass_class(**options)
    except (SpecError, ValueError) as error:
        raise call.span.error(str(error)) from error


def _options(call: Call, kind_class: type[Any], kind: str) -> dict[str, Any]:
    of = f"{kind} '{call.name.value}'"
    types = option_types(kind_class)
    names = [field.name for field in option_fields(kind_class)]
    options: dict[str, Any] = {}
    for key, value in call.options.entries:
        option = key.value if key.value in names else key.value.replace("-", "_")
        if option not in names:
            raise key.span.error(f"{of} has no option '{key.value}'{_meant(option, names)}")
        if option in options:
            raise key.span.error(f"option '{option}' of {of} is given twice")
        try:
            options[option] = coerce(value, types[option])
        except Mismatch as mismatch:
            given = mismatch.at.span
            shown = given.text[given.start : given.end]
            hint = f"; {mismatch.hint}" if mismatch.hint else ""
            raise given.error(f"option '{option}' of {of} is {mismatch.expected}, not {shown}{hint}") from mismatch
    return options


def _meant(option: str, names: Sequence[str]) -> str:
    near = nearest(option, names)
    if near:
        return f"; did you mean '{near}'?"
    return f"; its options are {_list(names)}" if names else ", nor any other"


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _render(item: Pass) -> str:
    given = []
    for field in option_fields(type(item)):
        value, default = getattr(item, field.name), default_of(field)
        # 1 == True == 1.0, but they are not the same text.
        if type(value) is not type(default) or value != default:
            given.append(f"{field.name}={_option_text(item, field.name, value)}")
    return f"{item.name}{{{','.join(given)}}}" if given else item.name


def _option_text(item: Pass, option: str, value: Any) -> str:
    try:
        return text_of(value)
    except PassError as error:
        raise PassError(f"pass '{item.name}', option '{option}': {error}") from error
