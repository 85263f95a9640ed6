"""Opaque roots: the user's own forward behind a graph of one call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.fx as fx
from torch import nn

from fxopt.capture.guards import NOT_GIVEN
from fxopt.capture.signature import STARS, bind, default_of
from fxopt.graph import GraphModule


class Shell:
    """Calls a module that is not registered anywhere, so that the names of its parameters stay.

    It shares its registries with the graph module that holds it: what is swapped there is swapped here.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, training: bool, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward, in the mode of the graph module."""
        self.module.training = training
        return self.module(*args, **kwargs)


def shell_module(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
    """A graph module whose one call runs the forward of `root` as it is."""
    graph = fx.Graph()
    positional: list[fx.Node] = []
    keywords: dict[str, fx.Node] = {}
    starred: list[tuple[str, fx.Node]] = []
    parameters = bind(root, args, kwargs).signature.parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    can_be_named = not kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
    for name, parameter in parameters.items():
        prefix = STARS.get(parameter.kind, "")
        node = graph.create_node("placeholder", prefix + name, default_of(parameter), {}, name)
        if prefix:
            starred.append((prefix, node))
        elif parameter.kind is parameter.KEYWORD_ONLY or (len(positional) >= len(args) and can_be_named):
            # A decorator of the user's forward may look for an argument among the keyword ones.
            keywords[name] = node
        else:
            positional.append(node)
    shell, training = graph.create_node("get_attr", "_shell"), graph.create_node("get_attr", "training")
    rest: dict[str, Any] = dict(starred)
    arguments: tuple[Any, ...] = (tuple(positional), rest.get("*", ()), keywords, rest.get("**", {}))
    call = graph.call_function(run_shell, (shell, training, *arguments))
    call.meta["module_path"] = ""
    graph.output(call)
    module = GraphModule(root, {root.training: graph}, type(root).__name__, origin=root, by_origin=True)
    module.__dict__["_shell"] = Shell(root)
    module.recompile()
    return module


def run_shell(
    shell: Shell,
    training: bool,
    positional: tuple[Any, ...],
    rest: tuple[Any, ...],
    keywords: dict[str, Any],
    more: dict[str, Any],
) -> Any:
    """Call a shell: what the node of an opaque root does."""
    if any(value is NOT_GIVEN for value in (*positional, *keywords.values())):
        parameters = inspect.signature(shell.module.forward).parameters
        positional = tuple(_or_default(*pair) for pair in zip(positional, parameters.values(), strict=False))
        keywords = {name: _or_default(value, parameters[name]) for name, value in keywords.items()}
    return shell(training, *positional, *rest, **keywords, **more)


def _or_default(value: Any, parameter: inspect.Parameter) -> Any:
    return parameter.default if value is NOT_GIVEN else value
