"""A torch.fx.GraphModule that keeps the whole module tree, and a graph for each mode where the two differ."""

from __future__ import annotations

import copy
import inspect
import io
import operator
import pickle
import pkgutil
import sys
import types
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.graph.modes import back_on_error

_TREE = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class GraphModule(fx.GraphModule):
    """The captured form of a module: its tree of submodules, parameters and buffers, run by a graph.

    Unlike torch.fx's own, it keeps everything that was registered, called or not and in the order of the
    original, so `state_dict` keys and `named_parameters` stay; it deep-copies and pickles the graph itself
    rather than tracing generated code anew, so node metadata stays; and where training and evaluation take
    different paths it holds one graph for each, between which `train()` and `eval()` switch.

    Args:
        root: the module whose tree is taken over. It is not copied.
        graphs: the graph of each mode (`True`: training), or of one mode where both are the same.
        name: what error messages and `repr` call the module; mostly the class name of the original.
        origin: the original, where its own Python code is to be asked for more than `forward`: how it switches
            modes, what its state is, and the attributes and methods that this module has not. It shares the
            tree with this module. A method of it that calls it, as `generate` does, runs the graph, unless the
            graph itself runs the original's `forward`.
        by_origin: whether it does.
    """

    def __init__(
        self,
        root: nn.Module,
        graphs: Mapping[bool, fx.Graph],
        name: str = "GraphModule",
        origin: nn.Module | None = None,
        by_origin: bool = False,
    ):
        super().__init__(nn.Module(), _empty_graph(), name)
        for part in _TREE:
            self.__dict__[part] = root.__dict__[part]
        for part in _STATE_HOOKS:
            self.__dict__[part] = root.__dict__.get(part, self.__dict__[part])
        self.__dict__["_origin"] = origin
        if origin is not None and not by_origin:
            origin.__dict__["forward"] = _ByGraph(self)
            # The graph has them.
            origin._forward_hooks.clear()
            origin._forward_pre_hooks.clear()
        self.training = root.training
        self._graphs = dict(graphs)
        self._select()

    @property
    def graphs(self) -> Mapping[bool | None, fx.Graph]:
        """The graphs that this module runs: `{None: graph}` where both modes share one, else one a mode."""
        if len(self._graphs) == 1:
            return {None: self._graph}
        return {mode: self._graphs[mode] for mode in (False, True)}

    def train(self, mode: bool = True) -> GraphModule:
        """Switch to training (or evaluation) mode, and to the graph of that mode where there are two."""
        if self._origin is None:
            super().train(mode)
        else:
            self._origin.train(mode)
            self.training = self._origin.training
        self._select()
        return self

    def keep_only(self, graph: fx.Graph) -> None:
        """Run one of the graphs in both modes from now on, and drop the other."""
        self._graphs = {self.training: graph}
        self._select()

    def become(self, other: GraphModule) -> None:
        """Take over the tree and the graphs of `other`, which must not be used any more."""
        for key in _state(self):
            del self.__dict__[key]
        self.__dict__.update(_state(other))
        self._graphs = dict(other._graphs)
        self._restore()

    def __getattr__(self, name: str) -> Any:
        origin = self.__dict__.get("_origin")
        if origin is None or name.startswith("__") or name in self._parameters or name in self._modules:
            return super().__getattr__(name)
        return getattr(origin, name)

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get("_modules", {}).get(name)
        if old is not None and isinstance(value, nn.Module) and not _is_built_alike(value, old):
            inside = [str(node.target) for graph in self._graphs.values() for node in graph.nodes if _reads(node, name)]
            if inside:
                warnings.warn(
                    f"what is now '{name}' does not run as a whole: the graph calls '{inside[0]}' and the like in it "
                    "by name, and nothing else of it. Put it into the original, and capture that",
                    stacklevel=2,
                )
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._origin is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            self._origin._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._origin is None:
            super()._load_from_state_dict(*args, **kwargs)
        else:
            self._origin._load_from_state_dict(*args, **kwargs)

    def recompile(self) -> Any:
        """Regenerate the code of the graph at hand (and drop what was compiled of the other one)."""
        self.__dict__["_compiled"] = {}
        code = super().recompile()
        cls: Any = type(self)  # one of its own, as torch.fx makes for each graph module
        cls.forward = back_on_error(cls.forward, self._graph)
        refused = {str(node.target)[2:] for node in self._graph.find_nodes(op="placeholder") if _is_refused(node)}
        if refused:
            # Callers see by it what they may give, as transformers' Trainer does for the number of items in a batch.
            signature = inspect.signature(cls.forward)
            taken = [each for name, each in signature.parameters.items() if name not in refused]
            cls.forward.__signature__ = signature.replace(parameters=taken)
        return code

    def _select(self) -> None:
        graph = _of_mode(self._graphs, self.training)
        if graph is not self._graph:
            self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        duplicate = _blank(type(self).__name__)
        memo[id(self)] = duplicate
        for key, value in _state(self).items():
            duplicate.__dict__[key] = copy.deepcopy(value, memo)
        duplicate._graphs = {mode: _copy_graph(graph) for mode, graph in self._graphs.items()}
        duplicate._restore()
        return duplicate

    def __copy__(self) -> GraphModule:
        duplicate = _blank(type(self).__name__)
        duplicate.__dict__.update(_state(self) | {"_origin": copy.copy(self._origin)})
        duplicate._graphs = {mode: _copy_graph(graph) for mode, graph in self._graphs.items()}
        duplicate._restore()
        return duplicate

    def __reduce__(self) -> tuple[Any, ...]:
        frozen = {mode: _freeze(graph) for mode, graph in self._graphs.items()}
        # Bytes of their own, since torch.save insists on a protocol that can't name torch's functions.
        written = io.BytesIO()
        _GraphPickler(written).dump(frozen)
        return _thaw_module, (type(self).__name__, _state(self), written.getvalue())

    def _restore(self) -> None:
        if self._origin is not None and isinstance(self._origin.__dict__.get("forward"), _ByGraph):
            self._origin.__dict__["forward"] = _ByGraph(self)
        self.graph = _of_mode(self._graphs, self.training)


class _ByGraph:
    """What the original of a graph module has for a `forward`: the graph.

    A copy of it belongs to no graph module, until the copy of the one that it belonged to takes it.
    """

    def __init__(self, module: GraphModule | None = None):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.module is not None
        return self.module(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        assert self.module is not None
        return inspect.signature(self.module.forward)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ByGraph, ()


def _is_refused(placeholder: fx.Node) -> bool:
    """Whether it stands for further keywords, and all that the graph asks of them is that there are none."""
    return str(placeholder.target).startswith("**") and all(user.args[1:2] == ([],) for user in placeholder.users)


def _is_built_alike(one: nn.Module, other: nn.Module) -> bool:
    return type(one) is type(other) and [*one._modules] == [*other._modules]


def _reads(node: fx.Node, name: str) -> bool:
    """Whether it calls or reads what is in a part of this name, and not the part itself."""
    return node.op in ("call_module", "get_attr") and str(node.target).startswith(f"{name}.")


def _state(module: GraphModule) -> dict[str, Any]:
    """All attributes but the graphs and what is generated from them."""
    generated = ("_graph", "_graphs", "_compiled", "_code", "_lineno_map", "_prologue_start")
    return {key: value for key, value in module.__dict__.items() if key not in generated}


def _of_mode(graphs: Mapping[bool, fx.Graph], training: bool) -> fx.Graph:
    found = graphs.get(training)
    return next(iter(graphs.values())) if found is None else found


def _blank(name: str) -> GraphModule:
    return GraphModule(nn.Module(), {False: _empty_graph()}, name)


def _empty_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(None)
    return graph


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    duplicate = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = duplicate.node_copy(node, values.__getitem__)
        values[node].name = node.name
    duplicate.set_codegen(copy.copy(graph._codegen))
    return duplicate


# A graph is pickled as a flat list: the links between fx nodes would recurse once a node.


def _freeze(graph: fx.Graph) -> list[tuple[Any, ...]]:
    def reference(node: fx.Node) -> _Reference:
        return _Reference(node.name)

    return [
        (
            node.op,
            node.target,
            fx.node.map_arg(node.args, reference),
            fx.node.map_arg(node.kwargs, reference),
            node.name,
            node.meta,
        )
        for node in graph.nodes
    ]


class _GraphPickler(pickle.Pickler):
    """Knows functions by the name under which their module offers them, and operators by that in `torch.ops`.

    `torch.nn.functional.max_pool2d` and its kin are closures, which pickle would look for inside of the function
    that made them; `torch.ops.torchvision.nms` holds what can't be pickled.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _torch_operator, (str(value),)
        if not isinstance(value, types.FunctionType) or "<locals>" not in value.__qualname__:
            return NotImplemented
        module = sys.modules.get(value.__module__)
        name: str = value.__name__
        if getattr(module, name, None) is not value:
            return NotImplemented
        return pkgutil.resolve_name, (f"{value.__module__}:{name}",)


def _torch_operator(path: str) -> Any:
    return operator.attrgetter(path)(torch.ops)


class _Reference(str):
    """The name of a node, where a pickled argument meant that node."""


def _thaw(frozen: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolve(value: Any) -> Any:
        return nodes[value] if isinstance(value, _Reference) else value

    for op, target, args, kwargs, name, meta in frozen:
        node = graph.create_node(
            op,
            target,
            fx.node.map_aggregate(args, resolve),
            fx.node.map_aggregate(kwargs, resolve),
            name,
        )
        node.name = name
        node.meta = meta
        nodes[name] = node
    return graph


def _thaw_module(name: str, state: dict[str, Any], frozen: bytes) -> GraphModule:
    module = _blank(name)
    module.__dict__.update(state)
    module._graphs = {mode: _thaw(nodes) for mode, nodes in pickle.loads(frozen).items()}
    module._restore()
    return module
