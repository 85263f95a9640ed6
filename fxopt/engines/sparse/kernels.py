"""The ways to compute a linear layer whose weight has zeros; which one is fastest is measured.

Those in `LAST` take and give (…, features), those in `FIRST` features first, in chunks. Each takes a `Layer` and gives
a function of its input and of what is added, or None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from fxopt.engines.layer import Layer
from fxopt.engines.onednn.kernels import mkl as packed_mkl
from fxopt.engines.onednn.kernels import packed as packed_onednn
from fxopt.engines.onednn.kernels import plain
from fxopt.engines.sparse.linear import csr as csr_matrix
from fxopt.engines.sparse.quiet import quiet
from fxopt.engines.sparse.semi_structured import LIBRARIES, is_two_of_four
from fxopt.engines.sparse.semi_structured import semi_structured as semi_structured_or_why_not
from fxopt.modules.functional import tail

Kernel = Callable[..., torch.Tensor]
Make = Callable[[Layer], Kernel | None]
_BLOCK = 16
_SPARSE_ENOUGH = 0.4
"""Share of zeros below which no sparse format was ever measured to be faster."""


def packed(layer: Layer) -> Kernel | None:
    """The dense product by oneDNN, on a weight in the layout that it likes best."""
    return packed_onednn(layer) if torch.backends.mkldnn.is_available() else None


def bfloat16(layer: Layer) -> Kernel | None:
    """The dense product in bfloat16, where the processor has instructions for it."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
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
    if not _is_sparse(layer.weight) or not torch.backends.mkl.is_available():
        return None
    return _over_chunks(layer, csr_matrix(*_compressed(layer.weight), layer.weight.shape))


def bags(layer: Layer) -> Kernel | None:
    """Compressed rows, each of which picks rows of the input and adds them up, as an embedding bag does.

    FBGEMM generates this loop for the width of a chunk and keeps the sums in registers: at 64 samples up to 3 times as
    fast as MKL's product on Zen 5. It needs 16 samples to fill a register of AVX-512.
    """
    if not _is_sparse(layer.weight):
        return None
    starts, columns, values = _compressed(layer.weight)
    outputs, activation = layer.weight.shape[0], layer.activation
    column = layer.weight.new_zeros(1) if layer.bias is None else layer.bias.unsqueeze(1)

    def product(x: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(columns, x, starts, mode="sum", per_sample_weights=values, include_last_offset=True)

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        chunks, _, width = x.shape
        if chunks == 1:
            return tail(product(x[0]).add_(column).unsqueeze(0), other, activation)
        out = x.new_empty(chunks, outputs, width)
        for index in range(chunks):
            torch.add(product(x[index]), column, out=out[index])
        return tail(out, other, activation)

    return run


def bsr(layer: Layer) -> Kernel | None:
    """Compressed rows of dense blocks of 16x16."""
    outputs, inputs = layer.weight.shape
    if outputs % _BLOCK or inputs % _BLOCK or not torch.backends.mkl.is_available():
        return None
    blocks = layer.weight.reshape(outputs // _BLOCK, _BLOCK, inputs // _BLOCK, _BLOCK).any(3).any(1)
    if not _is_sparse(blocks):
        return None
    found = quiet(lambda: layer.weight.to_sparse_bsr((_BLOCK, _BLOCK)))
    starts, columns = found.crow_indices().int(), found.col_indices().int()
    size = (outputs, inputs)
    return _over_chunks(
        layer, quiet(lambda: torch.sparse_bsr_tensor(starts, columns, found.values(), size, check_invariants=False))
    )


def semi_structured(library: str, layer: Layer) -> Kernel | None:
    """Two of each four, on the sparse tensor cores of a GPU."""
    if not is_two_of_four(layer.weight):
        return None
    found = semi_structured_or_why_not(library, layer)
    return None if isinstance(found, str) else found


LAST: Mapping[str, Make] = {
    "dense": plain,
    "packed": packed,
    "mkl": packed_mkl,
    "smaller": smaller,
    "bfloat16": bfloat16,
}
"""With features last, by the name that a saved choice has."""
FIRST: Mapping[str, Make] = {"dense-first": dense_first, "csr": csr, "bags": bags, "bsr": bsr}
"""With features first."""
CUDA: Mapping[str, Make] = {
    "dense": plain,
    "smaller": smaller,
    **{library: partial(semi_structured, library) for library in LIBRARIES},
}
"""On CUDA, with features last."""
KERNELS: Mapping[str, Make] = {**CUDA, **LAST, **FIRST}


def tables(device: str) -> tuple[Mapping[str, Make], Mapping[str, Make]]:
    """What there is on a type of device with features last, and with features first."""
    return (LAST, FIRST) if device == "cpu" else (CUDA, {})


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


def _compressed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each row starts, the columns and the values, by rows."""
    found = quiet(weight.to_sparse_csr)
    return found.crow_indices().int(), found.col_indices().int(), found.values()
