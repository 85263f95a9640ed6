"""Typed questions and edits of a captured graph: regions, call sites, aliases, effects, shapes."""

from fxopt.graph.affine import LAYERS, Affine, read_affine, why_not_plain
from fxopt.graph.axes import order_of_axes
from fxopt.graph.effects import Effects, eliminate_dead, is_written
from fxopt.graph.modes import Modes, why_other_mode
from fxopt.graph.module import GraphModule
from fxopt.graph.names import name_of, operands
from fxopt.graph.norm import NORM_CALL, BatchNorm, Norm, is_norm, rank_of, read_norm
from fxopt.graph.observe import observe
from fxopt.graph.product import Product, behind_mask, read_parameter, read_product
from fxopt.graph.region import Program, Region
from fxopt.graph.sharing import also_used, why_called_elsewhere, why_shared
from fxopt.graph.sizes import reads_sizes
from fxopt.graph.source import Source, inherit, source_of
from fxopt.graph.strides import hide_strides, why_noticed
from fxopt.graph.values import replace_values, scale_by_input, scale_by_output, shift_behind, why_shift_stays

__all__ = [
    "LAYERS",
    "NORM_CALL",
    "Affine",
    "BatchNorm",
    "Effects",
    "GraphModule",
    "Modes",
    "Norm",
    "Product",
    "Program",
    "Region",
    "Source",
    "also_used",
    "behind_mask",
    "eliminate_dead",
    "hide_strides",
    "inherit",
    "is_norm",
    "is_written",
    "name_of",
    "observe",
    "operands",
    "order_of_axes",
    "rank_of",
    "read_affine",
    "read_norm",
    "read_parameter",
    "read_product",
    "reads_sizes",
    "replace_values",
    "scale_by_input",
    "scale_by_output",
    "shift_behind",
    "source_of",
    "why_called_elsewhere",
    "why_not_plain",
    "why_noticed",
    "why_other_mode",
    "why_shared",
    "why_shift_stays",
]
