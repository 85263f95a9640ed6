"""The run in evaluation: every call that the forward makes, in order, and whether a second run agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from fxopt.findings import Place, Subject
from passes.audit.evidence.driver import UNWRITTEN, call, copied, floating, kept, random_state, telling_modules, tensors
from passes.audit.evidence.places import raised, running
from passes.audit.evidence.spread import Spread, flat, spread

_ACTIVATIONS = ("relu", "relu_", "sigmoid", "tanh", "softmax")


@dataclass(frozen=True)
class Value:
    """A tensor in an argument: the same number is the same tensor."""

    number: int
    shape: tuple[int, ...]
    floating: bool


@dataclass(frozen=True)
class Step:
    """One call of the torch API.

    Attributes:
        name: of the function: `relu`, `sqrt`, `__bool__`.
        args: tensors are replaced by `Value`.
        kwargs: likewise.
        outputs: numbers of the tensors that it returned.
        place: the user's line.
        module: qualified name of the module that was running.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    place: Place | None
    module: str

    @property
    def inputs(self) -> list[Value]:
        """The tensors it was given."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]


@dataclass(frozen=True)
class Activation:
    """One call of an activation function.

    Attributes:
        name: of the function.
        dead: whether it gave zeros only.
        flat: share of the elements where it has next to no gradient.
        place: the user's line.
        module: qualified name.
    """

    name: str
    dead: bool
    flat: float
    place: Place | None
    module: str


@dataclass
class Forward:
    """What was seen.

    Attributes:
        steps: every call.
        operators: the operators below the calls, with the place of each first use.
        random: places that drew random numbers of torch.
        draws_others: whether the forward drew those of Python or numpy.
        spoiled: the first places where numbers became NaN or infinite, with the operator.
        differs: whether two runs gave different outputs.
        error: what the forward raised, and where.
        activations: calls of ReLU, sigmoid, tanh and softmax.
        given: the spread of the first input that has one.
        layers: the spread of what each module returned, in the order in which they did so first.
        results: the spread of each output of the model.
        returned: numbers of the tensors that the model returned.
        tensors: arguments that were tensors: name of the module, and the position or the name.
        foreign: classes of the modules that ran and are none of the model's: whether they have parameters of their own.
    """

    steps: list[Step] = field(default_factory=list)
    operators: dict[Any, tuple[Place | None, str]] = field(default_factory=dict)
    random: list[tuple[Place | None, str]] = field(default_factory=list)
    draws_others: bool = False
    spoiled: list[tuple[Place | None, str, str]] = field(default_factory=list)
    differs: bool = False
    error: tuple[Exception, Place | None] | None = None
    activations: list[Activation] = field(default_factory=list)
    given: Spread | None = None
    layers: dict[str, Spread] = field(default_factory=dict)
    results: list[Spread] = field(default_factory=list)
    returned: set[int] = field(default_factory=set)
    tensors: set[tuple[str, int | str]] = field(default_factory=set)
    foreign: dict[type, bool] = field(default_factory=dict)

    def made(self) -> Iterator[tuple[Step, dict[int, Step]]]:
        """Each step, with those that made the tensors before it, or were the last to write into them."""
        found: dict[int, Step] = {}
        for step in self.steps:
            yield step, found
            for number in step.outputs:
                if number not in found or step.name.endswith("_"):
                    found[number] = step


class Tape(TorchFunctionMode):
    """Writes down calls of the torch API."""

    def __init__(self, seen: Forward, stack: list[str]):
        super().__init__()
        self.seen, self.stack = seen, stack
        self._numbers = WeakIdKeyDictionary()
        self._next = 0

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor, a new one where it has none."""
        if tensor not in self._numbers:
            self._next += 1
            self._numbers[tensor] = self._next
        return int(self._numbers[tensor])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        plain = pytree.tree_map_only(torch.Tensor, self._value, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = tuple(self.number(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        path = self.stack[-1] if self.stack else ""
        place = running()
        if name in _ACTIVATIONS and isinstance(result, torch.Tensor) and result.numel() and not result.is_meta:
            dead = name.startswith("relu") and not bool(result.any())
            dimension = args[1] if len(args) > 1 else kwargs.get("dim")
            dimension = dimension if isinstance(dimension, int) else -1
            share = 0.0 if name.startswith("relu") else flat(name, result, dimension)
            self.seen.activations.append(Activation(name, dead, share, place, path))
        self.seen.steps.append(Step(name, plain[0], plain[1], outputs, place, path))
        return result

    def _value(self, tensor: torch.Tensor) -> Value:
        return Value(self.number(tensor), tuple(tensor.shape), tensor.is_floating_point())


class Watch(TorchDispatchMode):
    """Sees the operators below: what is random, what spoils numbers, and which there are."""

    def __init__(self, seen: Forward, stack: list[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen, self.stack = seen, stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        path = self.stack[-1] if self.stack else ""
        if func not in self.seen.operators:
            self.seen.operators[func] = (running(), path)
        if torch.Tag.nondeterministic_seeded in func.tags and name not in ("aten::dropout",):
            self.seen.random.append((running(), path))
        with torch._C.DisableTorchFunction():  # what torch.function modes don't see would be on the tape
            spoils = not self.seen.spoiled and name not in UNWRITTEN and _spoils(args, result)
        if spoils:
            self.seen.spoiled.append((running(), path, name.removeprefix("aten::")))
        return result


def _spoils(args: Any, result: Any) -> bool:
    made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not made or made[0].is_meta or all(map(_sound, made)):
        return False
    given = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    scalars = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, float)]
    # A mask of minus infinity is meant.
    return bool(given) and all(map(_sound, given)) and not any(abs(value) == float("inf") for value in scalars)


def _sound(tensor: torch.Tensor) -> bool:
    # The sum is not finite where any element is not; only then is it worth looking at each.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


@contextmanager
def _measured(module: nn.Module, seen: Forward) -> Iterator[None]:
    """Note what each module is given, and how its results are spread."""

    def take(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [*enumerate(args), *kwargs.items()]
            seen.tensors |= {(path, key) for key, value in given if isinstance(value, torch.Tensor)}

        return hook

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with torch._C.DisableTorchFunction(), no_dispatch():  # else it would be on the tape
                first = next(iter(floating(output)), None)
                found = spread(first) if first is not None else None
            if found is not None:
                before = seen.layers.get(path)
                seen.layers[path] = found if before is None else before.joined(found)

        return hook

    inside, known = set(module.modules()), set(module.parameters())

    def look(each: nn.Module, args: Any) -> None:
        if each not in inside:
            brings = any(parameter not in known for parameter in each.parameters())
            seen.foreign[type(each)] = brings or seen.foreign.get(type(each), False)

    with ExitStack() as hooks:
        for path, each in module.named_modules():
            if not isinstance(each, torch.jit.ScriptModule):
                hooks.enter_context(each.register_forward_hook(note(path)))
                hooks.enter_context(each.register_forward_pre_hook(take(path), with_kwargs=True))
        hooks.enter_context(register_module_forward_pre_hook(look))
        yield


def run_forward(subject: Subject) -> Forward:
    """Run twice in evaluation."""
    assert subject.inputs is not None
    seen, stack = Forward(), list[str]()
    module = copied(subject, training=False)
    with kept(), torch.no_grad():
        before = random_state()[:-1]
        try:
            with telling_modules(module, stack), _measured(module, seen), Watch(seen, stack), Tape(seen, stack) as tape:
                first = call(module, subject)
            seen.returned = {tape.number(tensor) for tensor in tensors(first)}
            seen.results = [found for tensor in floating(first) if (found := spread(tensor)) is not None]
            inputs = pytree.tree_leaves((subject.inputs.args, dict(subject.inputs.kwargs)))
            spreads = (spread(leaf) for leaf in inputs if isinstance(leaf, torch.Tensor))
            seen.given = next((found for found in spreads if found is not None), None)
        except Exception as error:  # whatever a user's model raises
            seen.error = (error, raised(error))
            return seen
        seen.draws_others = random_state()[:-1] != before
        if seen.random or seen.draws_others:
            torch.default_generator.manual_seed(1)
            second = call(module, subject)
            pairs = list(zip(tensors(first), tensors(second), strict=False))
            seen.differs = not all(a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in pairs)
    return seen
