"""Reads a matrix product with a parameter, or a look-up in one, off a node."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph.region import Region
from fxopt.modules import Mask

_PRODUCTS = (operator.matmul, torch.matmul, torch.mm)
_METHODS = ("matmul", "mm", "__matmul__")


@dataclass(frozen=True)
class Product:
    """One use of a parameter of two dimensions by a function that is no layer of torch.nn.functional.

    Attributes:
        node: the call.
        kind: `matmul`, x W with W (in, out), or `embedding`, W[x] with W (rows, width).
        input: what it is applied to.
        weight: the parameter.
        weight_node: the read of it.
        bias_node: what is added, if it is a parameter too.
    """

    node: fx.Node
    kind: Literal["matmul", "embedding"]
    input: fx.Node
    weight: nn.Parameter
    weight_node: fx.Node
    bias_node: fx.Node | None = None


def read_product(node: fx.Node, region: Region) -> Product | None:
    """The product or look-up that `node` is; None where it is none, or of no parameter."""
    if node.op == "call_function" and node.target in (F.embedding, torch.embedding):
        return _look_up(node, region)
    given = node.args
    if _is_any(node, _PRODUCTS, _METHODS):
        return _of(node, "matmul", given[0], given[1], None, region) if len(given) == 2 else None
    if _is_any(node, (torch.addmm,), ("addmm",)) and len(given) == 3 and not node.kwargs:
        return _of(node, "matmul", given[1], given[2], given[0], region)
    return None


def read_parameter(node: Any, region: Region) -> nn.Parameter | None:
    """The floating-point parameter that a node reads; None where it reads none."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = region.attribute(node)
    return value if isinstance(value, nn.Parameter) and value.is_floating_point() else None


def behind_mask(node: Any, region: Region) -> Any:
    """The read of a parameter whose masked value `node` is; `node` itself where it is none."""
    if isinstance(node, fx.Node) and node.op == "call_module" and isinstance(region.submodule(node), Mask):
        return node.args[0]
    return node


def _look_up(node: fx.Node, region: Region) -> Product | None:
    weight_first = node.target is torch.embedding
    first, second = (node.args[i] if len(node.args) > i else None for i in range(2))
    ids = node.kwargs.get("indices" if weight_first else "input", second if weight_first else first)
    weight = node.kwargs.get("weight", first if weight_first else second)
    max_norm = node.args[3] if len(node.args) > 3 and not weight_first else node.kwargs.get("max_norm")
    return None if max_norm is not None else _of(node, "embedding", ids, weight, None, region)


def _is_any(node: fx.Node, functions: tuple[Any, ...], methods: tuple[str, ...]) -> bool:
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def _of(
    node: fx.Node, kind: Literal["matmul", "embedding"], value: Any, weight: Any, bias: Any, region: Region
) -> Product | None:
    parameter = read_parameter(weight, region)
    if parameter is None or parameter.dim() != 2 or not isinstance(value, fx.Node) or value.op == "get_attr":
        return None
    return Product(node, kind, value, parameter, weight, bias if read_parameter(bias, region) is not None else None)
