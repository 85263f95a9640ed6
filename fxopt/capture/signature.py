"""The placeholders of a graph: the captured module is called as the original one is."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from fxopt.capture.guards import NOT_GIVEN, guard_input
from fxopt.capture.provenance import Depends
from fxopt.capture.recorder import Recorder
from fxopt.capture.tensors import Origin

_MISSING = inspect.Parameter.empty
_GIVEN = Origin(Depends.DATA, Depends.SHAPE, numbers=Depends.SHAPE, given=True)


STARS: Mapping[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Match arguments with the parameters of `module.forward`.

    Raises:
        TypeError: as a call would.
    """
    return inspect.signature(module.forward).bind(*args, **kwargs)


def static_in(
    module: nn.Module, static: Collection[str | int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str | int]:
    """The `static` arguments of one call as those of another, which may give by name what that gave by position."""
    names = [name for name, each in inspect.signature(module.forward).parameters.items() if each.kind not in STARS]

    def name(key: str | int) -> str | int:
        return names[key] if isinstance(key, int) and key < len(names) else key

    wanted = {name(key) for key in static}
    return [key for key in (*range(len(args)), *kwargs) if name(key) in wanted]


def call_as_given(module: nn.Module, bound: inspect.BoundArguments, positional: int) -> Any:
    """Call `module` with `bound`, and with as many positional arguments as its user gave.

    A decorator of `forward` may look for an argument among the keyword ones.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif len(args) < positional:
            args.append(value)
        else:
            kwargs[name] = value
    return module(*args, **kwargs)


def record_inputs(recorder: Recorder, bound: inspect.BoundArguments) -> None:
    """Append a placeholder for each parameter, and put traced values into `bound`."""
    parameters = bound.signature.parameters
    given = set(bound.arguments)
    bound.apply_defaults()
    nodes = []
    for name, parameter in parameters.items():
        value = bound.arguments[name]
        prefix = STARS.get(parameter.kind, "")
        if prefix == "*" and not value:
            continue
        node = recorder.graph.create_node("placeholder", prefix + name, default_of(parameter), {}, name)
        nodes.append((name, node, value))
    for name, node, value in nodes:
        if name not in given and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
            recorder.emit("call_function", guard_input, (node, node.args[0], name))
            continue
        bound.arguments[name] = recorder.adopt(node, value, _GIVEN)
    for name in bound.arguments.keys() - given:
        del bound.arguments[name]


def default_of(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """What a placeholder of it is given: its default, `NOT_GIVEN` for one that code can't spell, or nothing."""
    if parameter.default is _MISSING:
        return ()
    return (parameter.default if _is_literal(parameter.default) else NOT_GIVEN,)


def _is_literal(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_literal, value))
    return value is None or isinstance(value, (bool, int, float, str))
