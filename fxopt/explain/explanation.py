"""Everything that is said about one captured module, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx
from torch import nn

from fxopt.capture import Captured, Constant, Coverage, Guard
from fxopt.explain.advice import advice
from fxopt.graph import GraphModule, source_of


@dataclass(frozen=True)
class Call:
    """One node of a graph.

    Attributes:
        name: of the node, or of the module that it calls.
        what: class of the module, or name of the function.
        module: qualified name of the module whose forward made the call.
        shape: of the result, `2x3x8x8 float32`; "" where it is no tensor.
        source: the user's line.
        uses: names of the nodes that it takes.
        node: its name in the graph.
    """

    name: str
    what: str
    module: str
    shape: str
    source: str
    uses: tuple[str, ...]
    node: str


@dataclass(frozen=True)
class Part:
    """One graph: of the root, or of what an opaque part calls.

    Attributes:
        path: qualified name, "" for the root.
        kind: class of the module.
        mode: "training" or "evaluation" where each has a graph of its own, else "".
        calls: its nodes, in order.
    """

    path: str
    kind: str
    mode: str
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Kept:
    """An opaque part, with what to change."""

    path: str
    kind: str
    reason: str
    location: str
    advice: str


@dataclass(frozen=True)
class Explanation:
    """A captured module, explained.

    Attributes:
        target: what it is called.
        inputs: what it was captured with.
        coverage: how much of it the graphs show.
        parts: the graphs.
        opaque: what they don't show.
        guards: what was assumed.
        constants: unregistered tensors that were met.
        notes: what else there is to know.
        kinds: class of each module, by qualified name.
    """

    target: str
    inputs: str
    coverage: Coverage
    parts: tuple[Part, ...]
    opaque: tuple[Kept, ...]
    guards: tuple[Guard, ...]
    constants: tuple[Constant, ...]
    notes: tuple[str, ...]
    kinds: dict[str, str]


def explain(captured: Captured, target: str, original: nn.Module, notes: tuple[str, ...] = ()) -> Explanation:
    """Explain what was captured of `original`, which the user calls `target`; `notes` are on how that was loaded."""
    kinds = {path: type(module).__name__ for path, module in original.named_modules()}
    return Explanation(
        target=target,
        inputs=captured.inputs.describe(),
        coverage=captured.coverage,
        parts=tuple(_parts(captured.module, kinds)),
        opaque=tuple(
            Kept(part.path, kinds.get(part.path, ""), part.reason, part.location, advice(part.reason))
            for part in captured.opaque
        ),
        guards=captured.guards,
        constants=captured.constants,
        notes=(*notes, *captured.notes),
        kinds=kinds,
    )


def _parts(module: GraphModule, kinds: dict[str, str]) -> Iterator[Part]:
    modes = {None: "", False: "evaluation", True: "training"}
    for path, child in module.named_modules():
        if isinstance(child, GraphModule):
            for mode, graph in child.graphs.items():
                yield Part(path, kinds.get(path, ""), modes[mode], tuple(_calls(child, graph, path)))


def _calls(module: GraphModule, graph: fx.Graph, path: str) -> Iterator[Call]:
    for node in graph.nodes:
        meta = node.meta.get("tensor_meta")
        shape = ""
        if hasattr(meta, "shape"):
            shape = f"{'x'.join(map(str, meta.shape)) or 'scalar'} {str(meta.dtype).removeprefix('torch.')}"
        yield Call(
            name=_join(path, str(node.target)) if node.op in ("call_module", "get_attr") else node.name,
            what=_what(node, module),
            module=_join(path, str(node.meta.get("module_path", ""))),
            shape=shape,
            source=source_of(node),
            uses=tuple(used.name for used in node.all_input_nodes),
            node=node.name,
        )


def _what(node: fx.Node, module: GraphModule) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    if node.op == "call_method":
        return f".{node.target}"
    return {"placeholder": "input", "get_attr": "reads", "output": "output"}[node.op]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
