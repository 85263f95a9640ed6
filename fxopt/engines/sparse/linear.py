"""A linear layer that computes, forward and backward, only what its mask keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxopt.engines.sparse.quiet import quiet


@dataclass(frozen=True)
class Indices:
    """Where a mask of (outputs, inputs) is true, by rows and by columns, in 32 bits: that is what MKL is fast with.

    Attributes:
        shape: of the mask.
        kept: flat positions in the mask, by rows.
        starts, columns: of each row, as CSR has them.
        order: by columns: which of `kept` comes when.
        column_starts, rows: of each column, as CSR of the transposed matrix has them.
    """

    shape: torch.Size
    kept: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    order: torch.Tensor
    column_starts: torch.Tensor
    rows: torch.Tensor

    @staticmethod
    def of(mask: torch.Tensor) -> Indices:
        """The indices of a mask of two dimensions."""
        kept = mask.flatten().nonzero().squeeze(1)
        rows, columns = kept // mask.shape[1], kept % mask.shape[1]
        order = columns.argsort(stable=True)
        return Indices(
            mask.shape,
            kept,
            _starts(mask.sum(1)),
            columns.int(),
            order,
            _starts(mask.sum(0)),
            rows[order].int(),
        )

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """The sparse matrix (outputs, inputs) of these values."""
        return csr(self.starts, self.columns, values, self.shape)

    def transposed(self, values: torch.Tensor) -> torch.Tensor:
        """The sparse matrix (inputs, outputs) of the same values."""
        return csr(self.column_starts, self.rows, values[self.order], self.shape[::-1])


def csr(starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: Any) -> torch.Tensor:
    """A CSR matrix from parts that are known to be right."""
    size = tuple(shape)
    return quiet(lambda: torch.sparse_csr_tensor(starts, columns, values, size=size, check_invariants=False))


def sparse_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | Indices
) -> torch.Tensor:
    """`F.linear(x, M W, b)`, with gradients for x, W and b. The gradient of W is zero where the mask is false.

    Work and memory grow with what the mask keeps: no dense product is made, but for the gradient of W, which is
    stored dense, as W is.

    Args:
        x: (…, inputs).
        weight: (outputs, inputs).
        bias: (outputs,), or None.
        mask: of booleans in the shape of the weight, or its `Indices`, which many calls can share.
    """
    indices = mask if isinstance(mask, Indices) else Indices.of(mask)
    return SparseLinearFunction.apply(x, weight, bias, indices)  # type: ignore[no-untyped-call, no-any-return]


class SparseLinearFunction(torch.autograd.Function):
    """See `sparse_linear`. It cannot be differentiated twice."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, indices: Indices
    ) -> torch.Tensor:
        """`(M W) x^T`, transposed."""
        values = weight.detach().reshape(-1)[indices.kept]
        columns = x.detach().reshape(-1, x.shape[-1]).t().contiguous()
        out = torch.mm(indices.matrix(values), columns)
        if bias is not None:
            out += bias.detach().unsqueeze(1)
        ctx.save_for_backward(columns, values)
        ctx.indices, ctx.shape = indices, x.shape
        return out.t().reshape(*x.shape[:-1], indices.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Of x, W and b."""
        columns, values = ctx.saved_tensors
        indices: Indices = ctx.indices
        given = gradient.reshape(-1, gradient.shape[-1]).t().contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(indices.transposed(values), given).t().reshape(ctx.shape)
        if ctx.needs_input_grad[1]:
            empty = indices.matrix(torch.zeros_like(values))
            products = torch.sparse.sampled_addmm(empty, given, columns.t(), beta=0).values()
            of_weight = given.new_zeros(indices.shape.numel()).index_copy_(0, indices.kept, products)
            of_weight = of_weight.reshape(indices.shape)
        if ctx.needs_input_grad[2]:
            of_bias = given.sum(1)
        return of_x, of_weight, of_bias, None


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
