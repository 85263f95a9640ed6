"""Guards: what the user's code decided while it was recorded, checked again at each call.

They are nodes of the graph, at the place where the decision was made, and so survive in generated source.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from fxopt.capture.traced import RELATIONS
from fxopt.errors import GuardError
from fxopt.nested import is_same

NOT_GIVEN = ...
"""Default of a parameter whose own is no literal: what is not given is left to the user's forward."""


def guard(actual: Any, relation: str, expected: Any, answer: bool, assumption: str, location: str) -> None:
    """Check that a comparison still gives the answer that it gave when the module was captured.

    Raises:
        GuardError: naming the assumption and the user's line that made it.
    """
    if _traced(guard, actual, relation, expected, answer, assumption, location):
        return
    if bool(RELATIONS[relation](actual, expected)) is not answer:
        raise _broken(assumption, location, f"{actual} here")


def refuse(comparisons: Sequence[tuple[Any, str, Any, bool]], error: str, text: str, location: str) -> None:
    """Refuse what the user's code refuses itself: here stands a check that raises an error.

    A compiler that reads the code takes a check of one tensor along as one of torch's own, a `RuntimeError`.

    Args:
        comparisons: a number or a tensor of one, how it is compared, as `<`, with what, and the answer that refuses
            the input, together with those of all others.
        error: the name of a builtin exception, raised by the user's code or a base of what it raises.
        text: the user's check.
        location: where it stands.

    Raises:
        Exception: the one that is named.
    """
    if _traced(refuse, *[each[0] for each in comparisons], given=(comparisons, error, text, location)):
        return
    message = f"the module refuses this input ({location}): {text}"
    answers = [answer for *_, answer in comparisons]
    found = [RELATIONS[relation](actual, expected) for actual, relation, expected, _ in comparisons]
    if torch.compiler.is_compiling() and len(found) == 1 and isinstance(found[0], torch.Tensor):
        torch._assert_async(found[0] != answers[0], message.replace('"', "'"))  # which C++ is generated of
    elif all(bool(one) is answer for one, answer in zip(found, answers, strict=True)):
        raise getattr(builtins, error)(message)


def guard_tensor(actual: torch.Tensor, expected: torch.Tensor, assumption: str, location: str) -> None:
    """Check that a tensor, of which the user's code looked at all values, still has them.

    Raises:
        GuardError: naming the assumption and the user's line that made it.
    """
    if _traced(guard_tensor, actual, expected, assumption, location):
        return
    if actual.shape != expected.shape or not torch.equal(actual.to(expected.device), expected):
        raise _broken(assumption, location, "other values here")


def guard_input(actual: Any, expected: Any, name: str) -> None:
    """Check an input that is not a tensor: capture took its value for granted.

    Raises:
        GuardError: naming the input.
    """
    if _traced(guard_input, actual, expected, name):
        return
    if not is_same(actual, expected):
        raise _broken(f"{name} is {_shown(expected)}", "an input", f"{_shown(actual)} here")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "not given" if value is NOT_GIVEN else repr(value)


def guard_items(actual: Any, expected: int | list[Any], name: str) -> None:
    """Check that a list or dict among the inputs has as many items, or the same keys, as the one that was captured.

    Raises:
        GuardError: naming the input.
    """
    if _traced(guard_items, actual, expected, name):
        return
    if isinstance(expected, int):
        found = len(actual) if isinstance(actual, (list, tuple)) else type(actual).__name__
        if found != expected:
            raise _broken(f"{name} has {expected} items", "an input", f"{found} here")
    else:
        # Where nothing is given by `**kwargs`, torch.fx.Interpreter has a list for it.
        keys = list(actual) if isinstance(actual, dict) or actual == [] else type(actual).__name__
        if keys != expected:
            raise _broken(f"{name} has the keys {expected}", "an input", f"{keys} here")


def guard_class(actual: Any, expected: str, name: str) -> None:
    """Check that an object among the inputs is of the class of the one that was captured, whose code was followed.

    Args:
        actual: the object.
        expected: what `class_name` said.
        name: of the input.

    Raises:
        GuardError: naming the input.
    """
    if _traced(guard_class, actual, expected, name):
        return
    if class_name(actual) != expected:
        raise _broken(f"{name} is a {expected}", "an input", f"{class_name(actual)} here")


def class_name(value: Any) -> str:
    """The class of a value, in words that generated code can hold."""
    cls = type(value)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def guard_parts(actual: Any, expected: Any, assumption: str, location: str) -> None:
    """Check that what Python code goes through or unpacks has as many parts as when the module was captured.

    Args:
        actual: a tuple of tensors, or what an opaque module gave: nested tuples, lists and dicts.
        expected: how many parts there were; or, nested, what `structure` said.

    Raises:
        GuardError: naming the assumption and the user's line that made it.
    """
    if _traced(guard_parts, actual, expected, assumption, location):
        return
    found = len(actual) if isinstance(expected, int) else structure(actual)
    if found != expected:
        raise _broken(assumption, location, f"{found} here" if isinstance(found, int) else "another structure here")


def structure(value: Any) -> Any:
    """The lists, tuples and dicts that a value is nested of, with None in the place of what they hold."""
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    return [structure(item) for item in value] if isinstance(value, (list, tuple)) else None


def guard_rank(actual: Any, dimensions: int, name: str) -> None:
    """Check that an input is a tensor with as many dimensions as the one that was captured.

    Raises:
        GuardError: naming the input.
    """
    if _traced(guard_rank, actual, dimensions, name):
        return
    if not isinstance(actual, torch.Tensor):
        raise _broken(f"{name} is a tensor", "an input", f"{type(actual).__name__} here")
    if actual.dim() != dimensions:
        raise _broken(f"{name} has {dimensions} dimensions", "an input", f"{actual.dim()} here")


def guard_dtype(actual: torch.Tensor, expected: torch.dtype, assumption: str, location: str) -> None:
    """Check an input whose dtype the user's code asked for.

    Any floating point dtype is as good as the captured one, so that what was captured can be cast.

    Raises:
        GuardError: naming the input and the user's line that asked.
    """
    if _traced(guard_dtype, actual, expected, assumption, location):
        return
    if actual.dtype is not expected and not (actual.is_floating_point() and expected.is_floating_point):
        raise _broken(assumption, location, f"{actual.dtype} here")


def guard_mode(training: bool, expected: bool, path: str, reason: str) -> None:
    """Check that a module is in the mode in which its graph was recorded.

    Raises:
        GuardError: naming the module, and why there is no graph for the other mode.
    """
    if training is not expected:
        raise _broken(f"{path} in {_MODES[expected]} mode", reason, f"in {_MODES[training]} mode here")


GUARDS = frozenset(
    {guard, guard_tensor, guard_input, guard_items, guard_class, guard_parts, guard_rank, guard_dtype, refuse}
)
"""What a graph calls for the sake of its errors alone."""

_MODES = {True: "training", False: "evaluation"}


def _traced(check: Callable[..., None], *args: Any, given: tuple[Any, ...] | None = None) -> bool:
    """Whether `torch.fx.symbolic_trace` is at work: then the guard goes on into its graph.

    Args:
        check: the guard.
        args: what may be a value of that graph.
        given: the arguments of the guard; `args` by default.
    """
    proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
    if proxy is None:
        return False
    proxy.tracer.create_proxy("call_function", check, args if given is None else given, {})
    return True


def _broken(assumption: str, location: str, found: str) -> GuardError:
    where = f" ({location})" if location else ""
    return GuardError(
        f"the captured graph holds for {assumption}{where}, but it is {found}",
        "capture again with such inputs, or pass on_guard_failure='recapture'",
    )
