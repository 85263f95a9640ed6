"""Typed questions and edits of a captured graph: regions, call sites, aliases, effects, shapes."""

from fxopt.graph.affine import Affine, read_affine, why_not_plain
from fxopt.graph.effects import Effects, eliminate_dead
from fxopt.graph.module import GraphModule
from fxopt.graph.observe import observe
from fxopt.graph.product import Product, read_parameter, read_product
from fxopt.graph.region import Program, Region
from fxopt.graph.sharing import also_used, why_called_elsewhere, why_shared
from fxopt.graph.source import Source, inherit, source_of
from fxopt.graph.strides import hide_strides, why_noticed

__all__ = [
    "Affine",
    "Effects",
    "GraphModule",
    "Product",
    "Program",
    "Region",
    "Source",
    "also_used",
    "eliminate_dead",
    "hide_strides",
    "inherit",
    "observe",
    "read_affine",
    "read_parameter",
    "read_product",
    "source_of",
    "why_called_elsewhere",
    "why_not_plain",
    "why_noticed",
    "why_shared",
]
