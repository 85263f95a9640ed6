"""The ways to compute a linear layer whose weight has zeros; which one is fastest is measured.

Those in `LAST` take and give (…, features), those in `FIRST` features first, in chunks. Each takes a `Layer` and gives
a function of its input and of what is added, or None where it does not apply.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from fxopt.engines.layer import Layer
from fxopt.engines.onednn.kernels import mkl as packed_mkl
from fxopt.engines.onednn.kernels import packed as packed_onednn
from fxopt.engines.sparse.linear import csr as csr_matrix
from fxopt.modules.functional import tail

Kernel = Callable[..., torch.Tensor]
Make = Callable[[Layer], Kernel | None]
_BLOCK = 16
_SPARSE_ENOUGH = 0.4
"""Share of zeros below which no sparse format was ever measured to be faster."""


def plain(layer: Layer) -> Kernel:
    """As torch runs it."""
    weight, bias, activation = layer.weight, layer.bias, layer.activation
    return lambda x, other=None: tail(F.linear(x, weight, bias), other, activation)


def bfloat16(layer: Layer) -> Kernel | None:
    """The dense product in bfloat16, where the processor has instructions for it."""
    if layer.weight.dtype is not torch.float32 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    weight = layer.weight.bfloat16()
    bias = None if layer.bias is None else layer.bias.bfloat16()
    activation = layer.activation
    return lambda x, other=None: tail(F.linear(x.bfloat16(), weight, bias).float(), other, activation)


def smaller(layer: Layer) -> Kernel | None:
    """Without the rows and columns that are all zero: a smaller dense product."""
    rows = layer.weight.any(1).nonzero().squeeze(1)
    columns = layer.weight.any(0).nonzero().squeeze(1)
    outputs, inputs = layer.weight.shape
    if len(rows) == outputs and len(columns) == inputs:
        return None
    weight = layer.weight[rows][:, columns].contiguous()
    whole = layer.weight.new_zeros(outputs) if layer.bias is None else layer.bias
    bias, activation = whole[rows], layer.activation

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if len(columns) < inputs:
            x = x.index_select(-1, columns)
        out = F.linear(x, weight, bias)
        if len(rows) < outputs:
            out = whole.repeat(*x.shape[:-1], 1).index_copy_(-1, rows, out)
        return tail(out, other, activation)

    return run


def dense_first(layer: Layer) -> Kernel:
    """The dense product with features first."""
    return _over_chunks(layer, layer.weight)


def csr(layer: Layer) -> Kernel | None:
    """Compressed rows with indices of 32 bits: MKL's, which those of 64 bits do not reach."""
    if not _is_sparse(layer.weight):
        return None
    found = _quiet(layer.weight.to_sparse_csr)
    starts, columns = found.crow_indices().int(), found.col_indices().int()
    return _over_chunks(layer, csr_matrix(starts, columns, found.values(), layer.weight.shape))


def bsr(layer: Layer) -> Kernel | None:
    """Compressed rows of dense blocks of 16x16."""
    outputs, inputs = layer.weight.shape
    if outputs % _BLOCK or inputs % _BLOCK:
        return None
    blocks = layer.weight.reshape(outputs // _BLOCK, _BLOCK, inputs // _BLOCK, _BLOCK).any(3).any(1)
    if not _is_sparse(blocks):
        return None
    found = _quiet(lambda: layer.weight.to_sparse_bsr((_BLOCK, _BLOCK)))
    starts, columns = found.crow_indices().int(), found.col_indices().int()
    size = (outputs, inputs)
    return _over_chunks(
        layer, _quiet(lambda: torch.sparse_bsr_tensor(starts, columns, found.values(), size, check_invariants=False))
    )


LAST: Mapping[str, Make] = {
    "dense": plain,
    "packed": packed_onednn,
    "mkl": packed_mkl,
    "smaller": smaller,
    "bfloat16": bfloat16,
}
"""With features last, by the name that a saved choice has."""
FIRST: Mapping[str, Make] = {"dense-first": dense_first, "csr": csr, "bsr": bsr}
"""With features first."""


def _over_chunks(layer: Layer, weight: torch.Tensor) -> Kernel:
    outputs = layer.weight.shape[0]
    dtype, activation = layer.weight.dtype, layer.activation
    row = layer.weight.new_zeros(outputs) if layer.bias is None else layer.bias.contiguous()
    column = row.unsqueeze(1)

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        chunks, _, width = x.shape
        if chunks == width == 1:
            return tail(torch.addmv(row, weight, x.view(-1)).view(1, outputs, 1), other, activation)
        if chunks == 1:
            return tail(torch.addmm(column, weight, x[0]).unsqueeze(0), other, activation)
        out = torch.empty(chunks, outputs, width, dtype=dtype)
        for index in range(chunks):
            torch.addmm(column, weight, x[index], out=out[index])
        return tail(out, other, activation)

    return run


def _is_sparse(weight: torch.Tensor) -> bool:
    return int(weight.count_nonzero()) <= (1 - _SPARSE_ENOUGH) * weight.numel()


def _quiet(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        return make()
