"""A graph as one Python function that looks nothing up: modules are bound as what they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx as fx
from torch import nn

from fxopt.graph import GraphModule, Program, Region
from fxopt.graph.modes import back_on_error


def bind(root: GraphModule) -> Callable[..., Any]:
    """The forward of a captured module in evaluation mode: a copy made for this, since its graphs are used up."""
    bound: Callable[..., Any] = root
    for region in Program(root).regions:
        if region.mode is True:
            continue
        forward = _bound(region)
        if region.module is root:
            bound = forward
        else:
            region.module.__dict__["forward"] = forward
    return bound


def named(called: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that a graph can call: generated code and tracebacks show it by this name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return called(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    call.__module__ = "fxopt"
    return call


def _bound(region: Region) -> Callable[..., Any]:
    graph = region.graph
    for node in list(graph.nodes):
        if node.op == "call_module":
            with graph.inserting_before(node):
                call = graph.call_function(named(_direct(region.submodule(node)), node.name), node.args, node.kwargs)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    return back_on_error(fx.GraphModule(region.module, graph).forward, graph)


def _direct(module: nn.Module) -> Callable[..., Any]:
    hooks = (module._forward_hooks, module._forward_pre_hooks, nn.modules.module._global_forward_hooks)
    usual = type(module).__call__ is nn.Module.__call__ and not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return module.forward if usual and not any(hooks) else module
