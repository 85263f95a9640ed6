"""Layer and root-mean-square normalisation that are written out.

(x - mean(x)) / sqrt(var(x) + eps) * w + b      =>  F.layer_norm(x, (C,), w, b, eps)
x / sqrt(mean(x^2) + eps) * w                   =>  F.rms_norm(x, (C,), w, eps)

Sources: Ba et al. 2016; Zhang and Sennrich 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn.functional as F

from fxopt.contract import Change, Skip
from fxopt.graph import Region, inherit, name_of, operands, source_of
from passes.attention.algebra import above, expand, is_equal, monomial
from passes.attention.call import (
    dtype_of,
    given,
    is_last,
    is_number,
    is_one_real_dtype,
    shape_of,
    why_written,
    without_casts,
)


@dataclass(frozen=True)
class _Moment:
    """What a normalisation divides by: sqrt(moment + eps).

    Attributes:
        x: what is normalised.
        mean: the mean that is subtracted; None where none is.
        axis: over what.
        eps: what is added.
    """

    x: fx.Node
    mean: fx.Node | None
    axis: Any
    eps: float


def recognise_norm(node: fx.Node, region: Region) -> Change | Skip | None:
    """The normalisation around `node`, its root, if it is one."""
    power = _power_of_root(node)
    moment = None if power is None else _moment(node)
    if power is None or moment is None:
        return None
    names = {moment.x: "x", node: "r"}
    formula = {monomial(x=1.0, r=power): 1.0}
    if moment.mean is not None:
        names |= dict.fromkeys(_means(moment.x, moment.axis), "m")
        formula |= {monomial(m=1.0, r=power): -1.0}
    for y in above(node):
        if is_one_real_dtype(moment.x, y) and is_equal(expand(y, names), formula):
            return _replace(y, moment, region)
    return None


def _replace(y: fx.Node, moment: _Moment, region: Region) -> Change | Skip | None:
    shape = shape_of(moment.x)
    if region.is_spared(y):
        return None
    where, line = region.qualified(y), source_of(y)
    if not is_last(moment.axis, moment.x) or shape is None:
        return Skip(where, f"it normalises over {moment.axis}; the operators of torch normalise the last axis", line)
    weight, last = _tail(y, "mul", shape[-1])
    bias, last = _tail(last, "add", shape[-1]) if moment.mean is not None else (None, last)
    reason = why_written(moment.x, moment.x, last, region)
    if reason is not None:
        return Skip(where, reason, line)
    known = weight if weight is not None else bias
    with region.graph.inserting_before(last):
        width = shape[-1] if known is not None else region.graph.call_method("size", (moment.x, -1))
    is_layer = moment.mean is not None
    function: Any = F.layer_norm if is_layer else F.rms_norm
    args = (moment.x, (width,), weight, *([bias] if is_layer else []), moment.eps)
    region.replace(last, inherit(region.insert_function(last, function, args), last))
    return Change(f"computed by {function.__name__}", where, line)


def _power_of_root(node: fx.Node) -> float | None:
    """1 for rsqrt(v), -1 for sqrt(v): the power to which it is a factor of the result."""
    name, both = name_of(node), operands(node)
    exponent = both[1] if name == "pow" and both is not None else None
    return 1.0 if name == "rsqrt" or exponent == -0.5 else -1.0 if name == "sqrt" or exponent == 0.5 else None


def _moment(root: fx.Node) -> _Moment | None:
    total = without_casts(root.args[0]) if root.args else None
    both = operands(total) if isinstance(total, fx.Node) and name_of(total) == "add" else None
    if both is None:
        return None
    moment, eps = both if is_number(both[1]) else both[::-1]
    moment = without_casts(moment)
    if not is_number(eps) or eps < 0 or not isinstance(moment, fx.Node):
        return None
    if name_of(moment) == "var":
        return _of_variance(moment, float(eps))
    reduced = _mean_of(moment)
    base = None if reduced is None else _square_root(reduced[0])
    if base is None or reduced is None:
        return None
    parts = operands(base) if name_of(base) == "sub" else None
    x = without_casts(parts[0]) if parts is not None else base
    mean = without_casts(parts[1]) if parts is not None else None
    if mean is not None and _mean_of(mean) == (x, reduced[1]):
        return _Moment(x, mean, reduced[1], float(eps))
    return _Moment(base, None, reduced[1], float(eps))


def _of_variance(node: fx.Node, eps: float) -> _Moment | None:
    asked = given(node, "input", "dim")
    biased = asked.get("unbiased") is False or asked.get("correction") == 0
    x = without_casts(asked.get("input", asked.get("self")))
    if not biased or asked.get("keepdim") is not True or "dim" not in asked or not isinstance(x, fx.Node):
        return None
    mean = next(iter(_means(x, asked["dim"])), None)
    return None if mean is None else _Moment(x, mean, asked["dim"], eps)


def _means(x: fx.Node, axis: Any) -> list[fx.Node]:
    same = [x, *(user for user in x.users if without_casts(user) is x)]
    return [user for node in same for user in node.users if _mean_of(user) == (x, axis)]


def _mean_of(node: Any) -> tuple[fx.Node, Any] | None:
    """What a node is the mean of, and over which axis, which it keeps."""
    if name_of(node) != "mean":
        return None
    asked = given(node, "input", "dim", "keepdim")
    x = without_casts(asked.get("input"))
    if asked.get("keepdim") is not True or asked.get("dtype") is not None or not isinstance(x, fx.Node):
        return None
    return x, asked.get("dim")


def _square_root(node: fx.Node) -> fx.Node | None:
    """d, where `node` is d squared."""
    name, both = name_of(node), operands(node)
    base: Any = None
    if name == "square":
        base = node.args[0]
    elif both is not None and ((name == "pow" and both[1] == 2) or (name == "mul" and both[0] is both[1])):
        base = both[0]
    found = without_casts(base)
    return found if isinstance(found, fx.Node) else None


def _tail(y: fx.Node, name: str, width: int) -> tuple[fx.Node | None, fx.Node]:
    """The weight or bias that is applied to `y` alone, and the result; nothing and `y` where there is none."""
    last = y
    while len(last.users) == 1:
        last = next(iter(last.users))
        if without_casts(last) is y:
            continue
        both = operands(last) if name_of(last) == name else None
        if both is not None:
            other = both[1] if without_casts(both[0]) is y else both[0]
            if isinstance(other, fx.Node) and shape_of(other) == (width,) and dtype_of(other) == dtype_of(y):
                return other, last
        break
    return None, y
