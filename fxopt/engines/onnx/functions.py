"""Functions of torch that its ONNX exporter refuses or computes otherwise, computed by others that it takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fxopt.capture.interception import replaced


class ExportedOtherwise(TorchFunctionMode):
    """While it is in force, functions that the exporter does not take as they are are computed by others."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, or what stands for it."""
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


@contextlib.contextmanager
def masks_unasked() -> Iterator[None]:
    """Let `nn.Transformer` take a mask as it is, without asking its values whether it is the causal one.

    To know it is for speed alone, and an exporter has no values.
    """
    with replaced(torch.nn.modules.transformer, "_detect_is_causal_mask", _is_said_to_be_causal):
        yield


def _is_said_to_be_causal(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *others: Any,
    **options: Any,
) -> torch.Tensor:
    """F.scaled_dot_product_attention with rows that are masked throughout  =>  with zeros there

    For booleans the exporter makes the smallest number of the mask, by which such a row becomes the mean of all values;
    by minus infinity it becomes NaN.
    """
    if attn_mask is None:
        return _of_four_axes(query, key, value, None, *others, **options)
    if attn_mask.dtype is torch.bool:
        seen = attn_mask
    else:
        seen, attn_mask = attn_mask > -math.inf, attn_mask.clamp(min=torch.finfo(attn_mask.dtype).min)
    return _of_four_axes(query, key, value, attn_mask, *others, **options) * seen.any(-1, keepdim=True)


def _of_four_axes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *others: Any,
    **options: Any,
) -> torch.Tensor:
    """F.scaled_dot_product_attention of fewer or more axes  =>  of four: with axes of size 1, or the first as one

    The exporter takes `enable_gqa` only where queries have more heads than keys.
    """
    options["enable_gqa"] = options.get("enable_gqa", False) and query.shape[-3] != key.shape[-3]
    missing = 4 - query.dim()
    if missing == 0:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **options)
    if missing > 0:
        # Masks stay: axes that they are short of are taken for those of size 1 anyway.
        query, key, value = (each[(None,) * missing] for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **options)[(0,) * missing]
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask)
        attn_mask = attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:]).flatten(0, -4)
    first = query.shape[:-3]
    query, key, value = (each.flatten(0, -4) for each in (query, key, value))
    found = F.scaled_dot_product_attention(query, key, value, attn_mask, *others, **options)
    return found.reshape(*first, *found.shape[1:])


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """The rows of `a` (rows, K) up to offs[0] by b[0] of `b` (groups, K, N), those up to offs[1] by b[1], ...

    Mixtures of experts are made of it. Each row takes its matrix; where there are more rows than matrices, which would
    be copied several times over, each takes its row of the product with all of them: more arithmetic, less memory.
    """
    if offs is None or (a.dim(), b.dim()) != (2, 3) or any(option is not None for option in options.values()):
        return torch._grouped_mm(a, b, offs=offs, **options)
    row = torch.arange(a.shape[0], device=a.device)
    # What lies behind the last offset is in no group, and nobody may read what comes of it.
    group = (row[:, None] >= offs).sum(1).clamp(max=b.shape[0] - 1)
    rows = a.shape[0]
    # To compare a free number of rows would bind it.
    example = rows.node.hint if isinstance(rows, torch.SymInt) else rows
    if example is not None and example <= b.shape[0]:
        return torch.bmm(a[:, None], b[group])[:, 0]
    return torch.matmul(a, b)[group, row]


def _cross_entropy(input: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """F.cross_entropy of smoothed labels, or of shares of classes  =>  the functions that torch composes it of

    ONNX has one operator for it that knows neither: the exporter drops the smoothing, and says nothing.

    Args:
        input, target: of which the mode is handed these by position.
        options: all the others, by name.
    """
    if not options["label_smoothing"] and not target.is_floating_point():
        return F.cross_entropy(input, target, **options)
    return _of_pixels(_composed, input, target, **options)


def _composed(input: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    reduction = torch.nn._reduction.get_enum(options["reduction"])
    rest = options["weight"], reduction, options["ignore_index"], options["label_smoothing"]
    return torch.ops.aten.cross_entropy_loss.default.decompose(input, target, *rest)  # type: ignore[no-any-return]


def _nll_loss(input: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """F.nll_loss of rows  =>  of images; see `_cross_entropy` for the arguments."""
    return _of_pixels(F.nll_loss, input, target, **options)


def _of_pixels(
    loss: Callable[..., torch.Tensor], input: torch.Tensor, target: torch.Tensor, **options: Any
) -> torch.Tensor:
    """A loss of rows (N, C)  =>  of images (N, C, 1, 1): of these the exporter takes it apart

    For rows it writes an operator of ONNX that OpenVINO does not read.
    """
    if input.dim() != 2:
        return loss(input, target, **options)
    found = loss(input[..., None, None], target[..., None, None], **options)
    return found.flatten() if options["reduction"] == "none" else found


def _conv3d(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *others: Any, **options: Any
) -> torch.Tensor:
    """F.conv3d without a bias  =>  with one of zeros: that which the exporter puts in its place has two axes."""
    return F.conv3d(input, weight, weight.new_zeros(weight.shape[0]) if bias is None else bias, *others, **options)


def _cumprod(input: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.cumprod  =>  products with what lies 1, 2, 4, ... places before: log2(n) steps for n places"""
    if input.dim() == 0:
        return torch.cumprod(input, dim, dtype=dtype)
    counts = dtype is None and not (input.is_floating_point() or input.is_complex())
    found = input.to(torch.int64 if counts else dtype or input.dtype)
    reach, places = 1, found.shape[dim]
    while reach < places:
        before = found.narrow(dim, 0, places - reach)
        found = torch.cat([found.narrow(dim, 0, reach), found.narrow(dim, reach, places - reach) * before], dim)
        reach *= 2
    return found


def _searchsorted(
    sorted_sequence: torch.Tensor, input: torch.Tensor, *, right: bool = False, side: str | None = None, **options: Any
) -> torch.Tensor:
    """torch.searchsorted  =>  how many of the sequence are less than each value, or not more, where `right`"""
    out_int32 = options.pop("out_int32", False)
    if not isinstance(input, torch.Tensor) or any(option is not None for option in options.values()):
        return torch.searchsorted(sorted_sequence, input, right=right, side=side, out_int32=out_int32, **options)
    sequence, values = sorted_sequence[..., None, :], input[..., None]
    passed = sequence <= values if right or side == "right" else sequence < values
    return passed.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _adaptive_pool(
    pool: Callable[..., Any], axes: int, reduce: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """An adaptive pooling whose windows differ in size, or of three axes  =>  axis by axis and window by window

    The exporter takes those alone that come down to a pooling of equal windows, and of two axes at most.
    """

    def pooled(input: torch.Tensor, output_size: Any, *others: Any, **options: Any) -> Any:
        wanted = [output_size] * axes if isinstance(output_size, int) else list(output_size)
        given = input.shape[-axes:]
        sizes = [size if want is None else want for size, want in zip(given, wanted, strict=True)]
        is_even = all(size % want == 0 for size, want in zip(given, sizes, strict=True))
        asks_indices = any(others) or any(options.values())
        if asks_indices or (is_even and axes < 3):
            return pool(input, output_size, *others, **options)
        for axis, (size, want) in enumerate(zip(given, sizes, strict=True), -axes):
            windows = [(number * size // want, -(-(number + 1) * size // want)) for number in range(want)]
            parts = [reduce(input.narrow(axis, start, end - start), axis, True) for start, end in windows]
            input = torch.cat(parts, axis)
        return input

    return pooled


def _avg_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """A pooling by a divisor, or with pads that count  =>  means of what lies in the input, times its share

    The exporter takes no divisor, and OpenVINO counts even what `ceil_mode` lets a window see behind the pad.
    """
    kernels, strides, pads = (
        [given] * 2 if isinstance(given, int) else list(given) * (2 // len(given))
        for given in (kernel_size, stride or kernel_size, padding)
    )
    if divisor_override is None and not (ceil_mode and count_include_pad and any(pads)):
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad)
    found = F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad=False)
    for axis, kernel, step, pad in zip((-2, -1), kernels, strides, pads, strict=True):
        size, shares = input.shape[axis], []
        for start in range(-pad, found.shape[axis] * step - pad, step):
            inside = min(start + kernel, size) - max(start, 0)
            shares.append(inside / (min(start + kernel, size + pad) - start) if divisor_override is None else inside)
        found = found * found.new_tensor(shares).unflatten(0, (-1, *[1] * (-1 - axis)))
    return found if divisor_override is None else found / divisor_override


def _scatter_reduce(
    input: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    """scatter_reduce by means  =>  the sums over how many they are of

    ONNX knows no means: the exporter writes the last value in their place, and says nothing.
    """
    if reduce != "mean":
        return torch.scatter_reduce(input, dim, index, src, reduce, include_self=include_self)
    # What nothing is added to stays as it is: a sum of one.
    total, count = (
        torch.scatter_reduce(into, dim, index, values, "sum", include_self=include_self)
        for into, values in ((input, src), (torch.ones_like(input), torch.ones_like(src)))
    )
    return torch.div(total, count, rounding_mode=None if input.is_floating_point() else "floor")


def _scatter_reduce_in_place(input: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    return input.copy_(_scatter_reduce(input, *args, **options))


_INSTEAD: dict[Callable[..., Any], Callable[..., Any]] = {
    F.adaptive_avg_pool3d: _adaptive_pool(F.adaptive_avg_pool3d, 3, torch.mean),
    F.adaptive_max_pool1d: _adaptive_pool(F.adaptive_max_pool1d, 1, torch.amax),
    F.adaptive_max_pool2d: _adaptive_pool(F.adaptive_max_pool2d, 2, torch.amax),
    F.adaptive_max_pool3d: _adaptive_pool(F.adaptive_max_pool3d, 3, torch.amax),
    F.avg_pool2d: _avg_pool2d,
    F.conv3d: _conv3d,
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.scaled_dot_product_attention: _attention,
    torch._grouped_mm: _grouped_mm,
    torch.cumprod: _cumprod,
    torch.searchsorted: _searchsorted,
    torch.Tensor.cumprod: _cumprod,
    torch.scatter_reduce: _scatter_reduce,
    torch.Tensor.scatter_reduce: _scatter_reduce,
    torch.Tensor.scatter_reduce_: _scatter_reduce_in_place,
}


def _log_sigmoid(x: Any) -> Any:
    """log(sigmoid(x))  =>  -softplus(-x), of which the former is minus infinity where the sigmoid is no float."""
    from onnxscript import opset18

    return opset18.Neg(opset18.Softplus(opset18.Neg(x)))


TRANSLATED: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.log_sigmoid.default: _log_sigmoid}
"""Operators that the exporter writes otherwise: they come out of what it takes apart, too."""
