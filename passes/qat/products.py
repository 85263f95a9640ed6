"""Matrix products of values, and of parameters that are no layer's: which of their arguments are multiplied."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph import Region, behind_mask, read_parameter
from passes.qat.insert import calls_fake_quantize

_FACTORS: dict[Any, tuple[tuple[int, str, int], ...]] = {
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul", "__matmul__"), ((0, "input", 0), (1, "other", 1))),
    **dict.fromkeys((torch.mm, torch.bmm, "mm", "bmm"), ((0, "input", 0), (1, "mat2", 1))),
    **dict.fromkeys((torch.addmm, "addmm"), ((1, "mat1", 0), (2, "mat2", 1))),
    **dict.fromkeys((torch.baddbmm, "baddbmm"), ((1, "batch1", 0), (2, "batch2", 1))),
    F.scaled_dot_product_attention: ((0, "query", 0), (1, "key", 0), (2, "value", 1)),
    F.linear: ((0, "input", 0), (1, "weight", 0)),
}
"""The arguments that each multiplies: place, name, and which axis of a matrix counts outputs there."""
_TRANSPOSES: frozenset[Any] = frozenset({torch.t, "t", torch.transpose, "transpose", getattr})
_FLOATS: dict[Any, str] = {
    F.embedding: "only an nn.Embedding has a form that looks up integers",
    F.embedding_bag: "there is no form of it that looks up integers",
    torch.einsum: "only as a matrix product would it be quantised",
}


@dataclass(frozen=True)
class Factor:
    """One argument of a product.

    Attributes:
        node: the value.
        index: its place among the arguments.
        name: its name there.
        read: for a parameter, the read of it or the call of its mask, maybe some transpositions before `node`; else
            None.
        reader: what uses that read.
        axis: the dimension of that parameter which counts outputs; None where it has more than two.
    """

    node: fx.Node
    index: int
    name: str
    read: fx.Node | None = None
    reader: fx.Node | None = None
    axis: int | None = None


def factors(node: fx.Node, region: Region) -> tuple[Factor, ...]:
    """What `node` multiplies; nothing where it is no product of floating-point tensors."""
    if node.op not in ("call_function", "call_method"):
        return ()
    found = []
    for index, name, outputs in _FACTORS.get(node.target, ()):
        value = node.args[index] if len(node.args) > index else node.kwargs.get(name)
        if not isinstance(value, fx.Node) or not _is_float(value):
            return ()
        chain = _before_transposes(value)
        read = chain[-1]
        if calls_fake_quantize(read, region):
            continue
        parameter = read_parameter(behind_mask(read, region), region)
        if parameter is None:
            found.append(Factor(value, index, name))
            continue
        reader, axis = chain[-2] if len(chain) > 1 else node, (outputs + len(chain) - 1) % 2
        found.append(Factor(value, index, name, read, reader, axis if parameter.dim() == 2 else None))
    return tuple(found)


def why_parameter_float(node: fx.Node, region: Region) -> str | None:
    """Why a parameter that `node` looks up or multiplies stays a float; None where it does not, or there is none."""
    if node.op == "call_module":
        is_bag = isinstance(region.submodule(node), nn.EmbeddingBag)
        return f"its table stays a float: {_FLOATS[F.embedding_bag]}" if is_bag else None
    why = _FLOATS.get(node.target) if node.op == "call_function" else None
    sources = [behind_mask(_before_transposes(source)[-1], region) for source in node.all_input_nodes if why]
    found = any(read_parameter(source, region) is not None for source in sources)
    return f"the parameter that it reads stays a float: {why}" if found else None


def _before_transposes(node: fx.Node) -> list[fx.Node]:
    """A value that only its one reader sees, and what it was before it was transposed, step by step."""
    chain = [node]
    while node.op.startswith("call_") and node.target in _TRANSPOSES and len(node.users) == 1:
        if node.target is getattr and node.args[1] not in ("T", "mT"):
            break
        node = node.all_input_nodes[0]
        chain.append(node)
    return chain


def _is_float(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is None or meta.dtype.is_floating_point
