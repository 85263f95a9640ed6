"""GELU and SiLU that are written out.

0.5 x (1 + erf(x / sqrt(2)))                              =>  F.gelu(x)
0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))         =>  F.gelu(x, approximate="tanh")
x sigmoid(x)                                              =>  F.silu(x)

Sources: Hendrycks and Gimpel 2016; Elfwing et al. 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Region, inherit, name_of, source_of, why_not_plain
from passes.attention.algebra import Polynomial, above, below, expand, is_equal, monomial
from passes.attention.call import is_one_real_dtype, why_written

_ROOT = math.sqrt(2 / math.pi)
_X, _XT = monomial(x=1.0), monomial(x=1.0, t=1.0)


@dataclass(frozen=True)
class _Form:
    """y(x, t) with t = function(u(x))."""

    inner: Polynomial
    outer: Polynomial
    function: Any
    options: tuple[tuple[str, str], ...] = ()


_HALVES = {_X: 0.5, _XT: 0.5}
_FORMS = {
    "erf": _Form({_X: 1 / math.sqrt(2)}, _HALVES, F.gelu),
    "tanh": _Form({_X: _ROOT, monomial(x=3.0): 0.044715 * _ROOT}, _HALVES, F.gelu, (("approximate", "tanh"),)),
    "sigmoid": _Form({_X: 1.0}, {_XT: 1.0}, F.silu),
}
_MODULES: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def recognise_activation(node: fx.Node, region: Region) -> Change | Skip | None:
    """The activation around `node`, its transcendental function, if it is one."""
    name = _function(node, region)
    form = _FORMS.get(name)
    if form is None or not node.args or len(node.users) > 1:
        return None
    for x in below(node.args[0]):
        if not is_equal(expand(node.args[0], {x: "x"}), form.inner):
            continue
        for y in above(node):
            if is_one_real_dtype(x, y) and is_equal(expand(y, {x: "x", node: "t"}), form.outer):
                return _replace(y, x, form, region)
    return None


def _function(node: fx.Node, region: Region) -> str:
    if node.op != "call_module":
        return name_of(node)
    module = region.submodule(node)
    base = next((kind for kind in _MODULES if isinstance(module, kind)), None)
    return _MODULES[base] if base is not None and why_not_plain(module, base) is None else ""


def _replace(y: fx.Node, x: fx.Node, form: _Form, region: Region) -> Change | Skip | None:
    if region.is_spared(y):
        return None
    where, line = region.qualified(y), source_of(y)
    reason = why_written(x, x, y, region)
    if reason is not None:
        return Skip(where, reason, line)
    region.replace(y, inherit(region.insert_function(y, form.function, (x,), dict(form.options)), y))
    return Change(f"computed by {form.function.__name__}", where, line)
