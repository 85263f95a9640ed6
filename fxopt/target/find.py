"""Which of the things that a file defines is the model."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxopt.errors import LoadError, MissingError
from fxopt.target.source import Source

FACTORIES = ("get_model", "build_model", "create_model")
_HOW = f"a variable `model`, a function {', '.join(f'`{name}`' for name in FACTORIES)}, or one nn.Module class"


@dataclass(frozen=True)
class Found:
    """The model, the name by which the command line asks for it, and what to tell the user."""

    name: str
    module: nn.Module
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Something that a user might mean by the model."""

    name: str
    kind: str
    needs: tuple[str, ...] = ()

    def line(self, source: Source) -> str:
        """What it is, and the command that chooses it."""
        choose = advice(self.name, self.needs) if self.needs else f"`{command(source, self.name)}`"
        return f"{self.kind} '{self.name}': {choose}"


def command(source: Source, name: str | None = None) -> str:
    """What to type to run a target."""
    return "fxopt run " + shlex.quote(f"{source.label}:{name}" if name else source.label)


def advice(name: str, needs: Sequence[str]) -> str:
    """What to do about a model that cannot be made without arguments."""
    given = ", ".join(f"{need}=..." for need in needs)
    return f"needs {', '.join(needs)}; add `def get_model(): return {name}({given})` and choose that"


def find(source: Source, name: str | None) -> Found:
    """The module that `name` names, or the one that the file means.

    Without a name it is a variable `model`, then a function of `FACTORIES`, then the one nn.Module class that
    needs no arguments.

    Raises:
        LoadError: where there is none or more than one; the message lists the candidates, each with the command
            that chooses it.
    """
    if name is not None:
        return Found(name, _make(source, name, _attribute(source, name)))
    namespace = vars(source.namespace)
    if isinstance(namespace.get("model"), nn.Module):
        return Found("model", namespace["model"])
    candidates = list(_candidates(source))
    usable = [candidate for candidate in candidates if not candidate.needs]
    for kind in ("function", "class"):
        chosen = [candidate for candidate in usable if candidate.kind == kind]
        if len(chosen) > 1:
            raise LoadError(f"'{source.label}' has more than one model; choose one:{_lines(source, candidates)}")
        if chosen:
            only = chosen[0].name
            return Found(only, _make(source, only, namespace[only]), _others(source, chosen[0], candidates))
    if candidates:
        raise LoadError(f"'{source.label}' does not say which model to take; choose one:{_lines(source, candidates)}")
    raise LoadError(f"'{source.label}' has no model: expected {_HOW} that needs no arguments")


def _candidates(source: Source) -> Iterator[Candidate]:
    seen: set[int] = set()
    for name, value in vars(source.namespace).items():
        if name.startswith("__") or id(value) in seen:
            continue
        own = getattr(value, "__module__", None) == source.namespace.__name__
        is_module = isinstance(value, type) and issubclass(value, nn.Module)
        if isinstance(value, nn.Module):
            yield Candidate(name, "variable")
        elif is_module and _has_forward(value) and not value.__module__.startswith("torch."):
            yield Candidate(name, "class" if own else "imported class", _required(value))
        elif name in FACTORIES and callable(value):
            yield Candidate(name, "function", _required(value))
        else:
            continue
        seen.add(id(value))


def _others(source: Source, chosen: Candidate, candidates: list[Candidate]) -> tuple[str, ...]:
    """A fresh module of a class is rarely meant where the file also holds a finished one."""
    if chosen.kind != "class":
        return ()
    return tuple(
        f"took class '{chosen.name}' with fresh weights; for variable '{other.name}': `{command(source, other.name)}`"
        for other in candidates
        if other.kind == "variable"
    )


def _attribute(source: Source, name: str) -> Any:
    value: Any = source.namespace
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            candidates = list(_candidates(source))
            listed = f"; it has:{_lines(source, candidates)}" if candidates else f"; it needs {_HOW}"
            raise MissingError(f"'{source.label}' has no '{name}'{listed}") from None
    return value


def _make(source: Source, name: str, value: Any) -> nn.Module:
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise LoadError(
            f"'{source.label}:{name}' is a {type(value).__name__}: expected an nn.Module, a class of one, or a "
            "function that returns one"
        )
    needs = _required(value)
    if needs:
        raise LoadError(f"'{source.label}:{name}' {advice(name, needs)}")
    with source.running(f"cannot make '{name}()'"):
        made = value()
    if not isinstance(made, nn.Module):
        raise LoadError(f"'{source.label}:{name}()' returned a {type(made).__name__}: expected an nn.Module")
    return made


def _required(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments without which `function` cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind not in variable)


def _has_forward(module_class: type[nn.Module]) -> bool:
    return module_class.forward is not nn.Module.forward and not inspect.isabstract(module_class)


def _lines(source: Source, candidates: list[Candidate]) -> str:
    return "".join(f"\n  {candidate.line(source)}" for candidate in candidates)
