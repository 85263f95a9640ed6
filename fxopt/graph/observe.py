"""Run a captured module node by node and look at every value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.fx as fx

from fxopt.graph.modes import back_on_error
from fxopt.graph.module import GraphModule

Visit = Callable[[GraphModule, fx.Node, Any], None]


def observe(module: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], visit: Visit) -> Any:
    """Run `module` and call `visit(graph_module, node, value)` after each node.

    Graphs inside opaque parts are visited too, each time that the opaque part's own Python code calls
    them. Returns the output of the run.
    """
    with _interpreted(module, visit):
        return module(*args, **kwargs)


@contextmanager
def _interpreted(root: GraphModule, visit: Visit) -> Iterator[None]:
    graph_modules = [child for child in root.modules() if isinstance(child, GraphModule)]
    for child in graph_modules:
        child.__dict__["forward"] = _Observed(child, visit)
    try:
        yield
    finally:
        for child in graph_modules:
            del child.__dict__["forward"]


class _Observed:
    """Stands in for the generated forward of one graph module."""

    def __init__(self, module: GraphModule, visit: Visit):
        self.module = module
        self.visit = visit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        bound = inspect.signature(forward).bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        run = _Interpreter(self.module, self.visit, bound.arguments).run
        return back_on_error(run, self.module.graph)()


class _Interpreter(fx.Interpreter):
    def __init__(self, module: GraphModule, visit: Visit, arguments: Mapping[str, Any]):
        super().__init__(module)
        self.visit = visit
        self.arguments = arguments

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.visit(self.module, n, value)  # type: ignore[arg-type]
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target.startswith("**"):  # no parameter of the signature where the graph refuses what it would hold
            return self.arguments.get(target[2:], {})
        return self.arguments[target.lstrip("*")]
