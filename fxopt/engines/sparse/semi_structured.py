"""Linear layers with two of each four weights at zero, by the sparse tensor cores of a GPU.

Sources: torch.sparse.to_sparse_semi_structured; Mishra et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from fxopt.engines.layer import Layer
from fxopt.engines.sparse.quiet import quiet
from fxopt.modules.functional import tail

LIBRARIES: Mapping[str, Any] = {
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": SparseSemiStructuredTensorCUTLASS,
}
"""What multiplies with such weights, and the form in which torch holds them for it."""
_DTYPES = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of each four neighbours in a row at least two are zero."""
    rows, columns = weight.shape
    return columns % 4 == 0 and not bool((weight.reshape(rows, -1, 4).count_nonzero(2) > 2).any())


def why_not(library: str, shape: torch.Size, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """What keeps a library from multiplying with a weight whose zeros are in the right places; None if nothing does.

    Args:
        library: a key of `LIBRARIES`.
        shape, dtype: of the weight.
        capability: of the GPU.
    """
    if capability < _AMPERE:
        return (
            f"its 2:4 zeros need a GPU of compute capability 8.0 or later, this one has {capability[0]}.{capability[1]}"
        )
    if dtype not in _DTYPES:
        return f"2:4 products are those of float16 and bfloat16, its weight is {dtype}; the pass 'cast' changes that"
    if library == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    least = LIBRARIES[library]._DTYPE_SHAPE_CONSTRAINTS[dtype]
    if shape[0] % least.sparse_min_rows or shape[1] % least.sparse_min_cols:
        steps = f"{least.sparse_min_rows} outputs and {least.sparse_min_cols} inputs"
        return f"it has {shape[0]} outputs and {shape[1]} inputs: 2:4 products of {library} need multiples of {steps}"
    return None


def semi_structured(library: str, layer: Layer) -> Callable[..., torch.Tensor] | str:
    """The product with a weight that `is_two_of_four`; or why the library can't do it."""
    weight, bias, activation = layer.weight, layer.bias, layer.activation
    reason = why_not(library, weight.shape, weight.dtype, torch.cuda.get_device_capability(weight.device))
    if reason is not None:
        return reason
    outputs, inputs = weight.shape

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.reshape(-1, inputs)
        out = F.linear(rows, packed, bias) if len(rows) else rows.new_empty(0, outputs)
        return tail(out.reshape(*x.shape[:-1], outputs), other, activation)

    try:
        # For which GPUs a library was built, only a call tells.
        packed = quiet(lambda: LIBRARIES[library].from_dense(weight.contiguous()))
        run(weight.new_zeros(1, inputs))
    except RuntimeError as error:
        return f"{library} refuses its 2:4 zeros: {str(error).partition(chr(10))[0]}"
    return run
