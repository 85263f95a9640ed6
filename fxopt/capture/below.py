"""The modules that opaque code calls: captured as graphs of their own, and put in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxopt.capture.call import Call
from fxopt.capture.leaves import is_leaf
from fxopt.graph import GraphModule

Capture = Callable[[nn.Module, Call, str], "GraphModule | None"]


@dataclass(frozen=True)
class Seen:
    """What opaque code did in one run.

    Attributes:
        calls: the arguments of the first call of each module that it called itself.
        hidden_calls: how many torch calls it made itself.
    """

    calls: dict[str, Call]
    hidden_calls: int


def calls_from(root: nn.Module, call: Call, inside: frozenset[str], islands: frozenset[str]) -> Seen:
    """Run `root` and watch its opaque code.

    Args:
        root: what to run; its state changes.
        call: the example.
        inside: the opaque modules; {""} for `root` itself.
        islands: modules whose calls are kept whoever calls them.

    A run that fails halfway, as one on tensors without values may, gives what was called until then.
    """
    found: dict[str, Call] = {}
    stack: list[str] = [""]
    counter = _Counter(lambda: stack[-1] in inside)

    call = call.fresh()
    static = {id(tensor) for tensor in call.static_tensors}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if (path in islands or (stack[-1] in inside and path not in inside)) and path not in found:
                given: list[tuple[int | str, object]] = [*enumerate(args), *kwargs.items()]
                handed_on = [key for key, value in given if id(value) in static]
                found[path] = Call(args, kwargs, handed_on).fresh()
            stack.append(path)

        return hook

    def leave(module: nn.Module, args: object, output: object) -> None:
        stack.pop()

    with ExitStack() as hooks:
        for path, module in root.named_modules():
            if path and not isinstance(module, torch.jit.ScriptModule):
                hooks.enter_context(module.register_forward_pre_hook(enter(path), prepend=True, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        with suppress(Exception), counter:  # the caller knows already whether it runs
            root(*call.args, **call.kwargs)
    return Seen(found, counter.calls)


class _Counter(TorchFunctionMode):
    """Counts torch calls while a question is answered by yes."""

    def __init__(self, is_counting: Callable[[], bool]):
        super().__init__()
        self.calls = 0
        self.is_counting = is_counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in ("__get__", "__set__") and self.is_counting():
            self.calls += 1
        return func(*args, **(kwargs or {}))


def with_unchosen(root: nn.Module, calls: Mapping[str, Call], inside: frozenset[str]) -> dict[str, Call]:
    """Examples for modules that this run did not call: those of one of the same class and shapes that it did.

    The experts that a router did not choose this time take what the chosen one took.
    """
    result = dict(calls)
    known: dict[tuple[object, ...], Call] = {}
    for path, call in calls.items():
        known.setdefault(_kind(root.get_submodule(path)), call)
    for path, module in root.named_modules():
        parents = list(_parents(path))
        if path in result or not path or path in inside or not any(parent in inside for parent in parents):
            continue
        if any(parent in result for parent in parents):
            continue
        twin = known.get(_kind(module))
        if twin is not None:
            result[path] = twin
    return result


def put_graphs_below(
    parent: GraphModule, calls: Mapping[str, Call], islands: frozenset[str], capture: Capture
) -> dict[str, nn.Module]:
    """Replace each of the modules that opaque code calls by its graph, under all of its names.

    What the graph of `parent` calls as well stays, but for `islands`.

    Returns what was replaced: path -> the module that was there.
    """
    in_graph = {
        id(parent.get_submodule(str(node.target)))
        for graph in parent.graphs.values()
        for node in graph.nodes
        if node.op == "call_module"
    }
    replaced: dict[str, nn.Module] = {}
    for path, call in calls.items():
        child = parent.get_submodule(path)
        if isinstance(child, GraphModule) or not _is_worth_it(child):
            continue
        if id(child) in in_graph and path not in islands:
            continue
        names = [name for name, module in parent.named_modules(remove_duplicate=False) if module is child]
        graph_module = capture(child, call, path)
        for name in names if graph_module is not None else ():
            replaced[name] = child
            parent.set_submodule(name, graph_module)  # type: ignore[arg-type]
    return replaced


def put(parent: nn.Module, children: Mapping[str, nn.Module]) -> None:
    """Put modules at their names."""
    for name, child in children.items():
        parent.set_submodule(name, child)


def put_what_holds(parent: nn.Module, graphs: Mapping[str, nn.Module], holds: Callable[[], bool]) -> tuple[str, ...]:
    """Put those graphs in with which `parent` still gives what it should; found by halves, as few break it.

    Args:
        parent: with the modules in place that the graphs were made of.
        graphs: one under all of its names.
        holds: whether `parent` as it is then gives what it should.

    Returns:
        The names of those that stay out.
    """
    before = {name: parent.get_submodule(name) for name in graphs}
    put(parent, graphs)
    if holds():
        return ()
    put(parent, before)
    distinct = list(dict.fromkeys(graphs.values()))
    if len(distinct) < 2:
        return tuple(graphs)
    halves = distinct[: len(distinct) // 2], distinct[len(distinct) // 2 :]
    return tuple(
        name
        for half in halves
        for name in put_what_holds(parent, {at: graph for at, graph in graphs.items() if graph in half}, holds)
    )


def _is_worth_it(module: nn.Module) -> bool:
    """Whether passes find more in a graph of `module` than in the module."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return not is_leaf(module) or isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))


def _kind(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tensor.shape) for name, tensor in module.state_dict().items() if hasattr(tensor, "shape"))
    return type(module), tuple(type(child) for child in module.modules()), shapes


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
