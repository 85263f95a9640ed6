"""Which layers a target means: by name, by operator, or by shape."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from fxopt.errors import SpecError

ALL_LINEAR = "all-linear"
_LINEAR = ("linear", "matmul")
_OPERATORS = (
    "linear matmul embedding attention recurrent weight conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d"
).split()

V = TypeVar("V")


def check_target(target: str, option: str) -> None:
    """Refuse what can't be a target.

    Raises:
        SpecError: naming the option.
    """
    kind, colon, rest = target.partition(":")
    if colon and kind == "re":
        try:
            re.compile(rest)
        except re.error as error:
            raise SpecError(f"lora: '{option}' has the regular expression '{rest}', which is wrong: {error}") from error
    elif colon and kind == "op" and rest not in _OPERATORS:
        near = difflib.get_close_matches(rest, _OPERATORS, n=1)
        hint = f"; did you mean 'op:{near[0]}'?" if near else ""
        raise SpecError(f"lora: '{option}' has the operator '{rest}', expected one of {', '.join(_OPERATORS)}{hint}")
    elif colon and kind == "shape" and not re.fullmatch(r"(\d+|\*)(x(\d+|\*))+", rest):
        raise SpecError(f"lora: '{option}' has the shape '{rest}', expected sizes and stars: 768x*")
    elif not target:
        raise SpecError(f"lora: '{option}' holds an empty text; it would match nothing")


def is_meant(target: str, names: Iterable[str], operators: Collection[str], shape: Sequence[int]) -> bool:
    """Whether a target means a weight.

    Args:
        target: `all-linear`; `re:` and a regular expression that matches all of a name; `op:conv2d`;
            `shape:768x*`, of the weight; a glob over the name; or a name, or its end after a dot.
        names: what the layer that has it may be called.
        operators: what its uses compute.
        shape: of it.
    """
    if target == ALL_LINEAR:
        return any(operator in _LINEAR for operator in operators)
    kind, colon, rest = target.partition(":")
    if colon and kind == "re":
        return any(re.fullmatch(rest, name) for name in names)
    if colon and kind == "op":
        return rest in operators
    if colon and kind == "shape":
        wanted = rest.split("x")
        return len(wanted) == len(shape) and all(w in ("*", str(n)) for w, n in zip(wanted, shape, strict=True))
    if any(sign in target for sign in "*?["):
        return any(fnmatchcase(name, target) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names)


def first_meant(
    patterns: Mapping[str, V], names: Sequence[str], operators: Collection[str], shape: Sequence[int]
) -> V | None:
    """The value of the first pattern that means a weight, or None."""
    return next((value for key, value in patterns.items() if is_meant(key, names, operators, shape)), None)


def nearest_names(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """The five names that `targets` were probably meant to match."""
    plain = [target.partition(":")[2] or target for target in targets]
    found: dict[str, float] = {}
    for name in names:
        ends = [name, name.rpartition(".")[2]]
        found[name] = max(difflib.SequenceMatcher(None, p.strip("*."), end).ratio() for p in plain for end in ends)
    return sorted(found, key=lambda name: -found[name])[:5]
