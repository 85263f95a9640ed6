"""Where the two factors of an update sit in a weight, and how they are applied without building the update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import PassError

Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """One kind of layer: a weight of `shape` and the factors A and B of its update `dW = B A`.

    The base class is a weight (out, in, ...) that is only ever used as a whole: A (r, in ...), B (out, r).

    Attributes:
        kind: the function of `torch.nn.functional` that the layer comes down to, or `weight`.
        shape: of the weight.
        options: of the function: stride, padding and so on.
    """

    kind: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """Adapters of one layout may share their factors, whatever applies them."""
        return "rows"

    @property
    def starts_normal(self) -> bool:
        """Whether A starts from a normal distribution rather than from that of a linear layer."""
        return False

    @property
    def groups(self) -> int:
        """Of a convolution; 1 elsewhere."""
        return int(self.options.get("groups", 1))

    def is_foldable(self, a: Tensor) -> bool:
        """Whether A sees what the weight sees, and not all inputs of a layer in groups."""
        return self.groups == 1 or a.shape[1] == self.shape[1]

    def shapes(self, rank: int) -> Pair:
        """Shapes of A and B."""
        return (rank, *self.shape[1:]), (self.shape[0], rank)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """`B A` in the shape of the weight."""
        return (b @ a.flatten(1)).reshape(self.shape)

    def apply(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `B A` makes of `x`, and the bias that B may have."""
        return self.base(x, self.delta(a, b))

    def base(self, x: Tensor, weight: Tensor) -> Tensor:
        """What a whole weight makes of `x`, without a bias."""
        raise PassError(f"a '{self.kind}' is not applied to inputs")

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix (out, everything else)."""
        return weight.flatten(1)

    def norm(self, weight: Tensor) -> Tensor:
        """Length of the weight of each output (out,)."""
        return _lengths(self.matrix(weight))

    def by_weight(self, scale: Tensor) -> Tensor:
        """`scale`, a value an output, in a shape that multiplies the weight."""
        return scale.reshape(-1, *[1] * (len(self.shape) - 1))

    def by_output(self, scale: Tensor) -> Tensor:
        """`scale`, a value an output channel, in a shape that multiplies the output."""
        return scale


class Linear(Form):
    """`x W^T`, W (out, in): A (r, in), B (out, r)."""

    def apply(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(x A^T) B^T`."""
        return F.linear(F.linear(x, a), b, bias)

    def base(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x W^T`."""
        return F.linear(x, weight)


class Matmul(Linear):
    """`x W`, W (in, out), as in GPT-2's Conv1D: A (r, in), B (out, r), `dW = (B A)^T`."""

    @property
    def layout(self) -> str:
        """Columns are outputs."""
        return "columns"

    def shapes(self, rank: int) -> Pair:
        """Those of the linear layer that it is."""
        return (rank, self.shape[0]), (self.shape[1], rank)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """`(B A)^T`."""
        return (b @ a).T

    def base(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x W`."""
        return x @ weight

    def matrix(self, weight: Tensor) -> Tensor:
        """`W^T`."""
        return weight.T

    def by_weight(self, scale: Tensor) -> Tensor:
        """A value a column."""
        return scale


class Experts(Form):
    """A weight (e, out, in), or (e, in, out) with the option `transposed`, that holds the matrices of e experts.

    A (e r, in) and B (out, r e) are an update of rank r for each, in the order of PEFT: rows of A go by experts first,
    columns of B by ranks.
    """

    @property
    def layout(self) -> str:
        """By experts."""
        return "experts"

    def shapes(self, rank: int) -> Pair:
        """Those of all experts together."""
        experts, out, inputs = self._sizes()
        return (experts * rank, inputs), (out, rank * experts)

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Expert by expert."""
        experts, out, inputs = self._sizes()
        product = b.reshape(out, -1, experts).permute(2, 0, 1) @ a.reshape(experts, -1, inputs)
        return self._turned(product)

    def norm(self, weight: Tensor) -> Tensor:
        """Of each output of each expert."""
        return _lengths(self._turned(weight)).flatten()

    def by_weight(self, scale: Tensor) -> Tensor:
        """Each expert has its own outputs."""
        return self._turned(scale.reshape(self.shape[0], -1, 1))

    def _sizes(self) -> tuple[int, int, int]:
        experts, out, inputs = self.shape
        return (experts, inputs, out) if self.options.get("transposed") else (experts, out, inputs)

    def _turned(self, value: Tensor) -> Tensor:
        return value.transpose(1, 2) if self.options.get("transposed") else value


class Embedding(Form):
    """`W[ids]`, W (rows, width): A (r, width), B (rows, r), `B[ids] A`; what stands for padding has no gradient."""

    @property
    def starts_normal(self) -> bool:
        """As embeddings do."""
        return True

    def apply(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Looks up rows of B only."""
        return F.embedding(x, b, **self.options) @ a

    def base(self, x: Tensor, weight: Tensor) -> Tensor:
        """`W[ids]`."""
        return F.embedding(x, weight)

    def norm(self, weight: Tensor) -> Tensor:
        """Of each column: DoRA's outputs are the dimensions of the embedding."""
        return _lengths(weight.T)

    def by_weight(self, scale: Tensor) -> Tensor:
        """A value a column."""
        return scale


class Conv(Form):
    """A convolution, W (out, in / g, k ...), with g groups.

    A (g r, in / g, k ...) is a convolution like the base one and B (out, r, 1 ...) one of size 1, both in g
    groups, so that the update is one of the grouped weight. PEFT's A (r', in, k ...) looks at all inputs
    instead: it runs here too, but no weight of the grouped layer holds it.
    """

    placing: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation")

    @property
    def layout(self) -> str:
        """By groups."""
        return f"conv{self.groups}"

    def shapes(self, rank: int) -> Pair:
        """A group has no more rank than its own weight."""
        out, per_group = self.shape[0], self.shape[1:]
        if self.groups > 1:
            rank = min(rank, out // self.groups, int(torch.Size(per_group).numel()))
        return (rank * self.groups, *per_group), (out, rank, *[1] * (len(self.shape) - 2))

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """Group by group."""
        if not self.is_foldable(a):
            raise PassError(
                f"an update whose A {tuple(a.shape)} sees all inputs is no update of the grouped weight {self.shape}"
            )
        groups, out = self.groups, self.shape[0]
        rows = b.reshape(groups, out // groups, -1) @ a.reshape(groups, a.shape[0] // groups, -1)
        return rows.reshape(self.shape)

    def apply(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Two convolutions, the second of size 1."""
        function = getattr(F, self.kind)
        return function(self._convolve(x, a, self.groups if self.is_foldable(a) else 1), b, bias, groups=self.groups)  # type: ignore[no-any-return]

    def base(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution."""
        return self._convolve(x, weight, self.groups)

    def by_output(self, scale: Tensor) -> Tensor:
        """Channels are the second dimension, or the first where there is no batch."""
        return scale.reshape(-1, *[1] * (len(self.shape) - 2))

    def _convolve(self, x: Tensor, weight: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
        options = {key: self.options[key] for key in self.placing if key in self.options}
        if self.options.get("padding_mode", "zeros") != "zeros":
            x = F.pad(x, self.options["pad"], mode=self.options["padding_mode"])
            options["padding"] = 0
        return getattr(F, self.kind)(x, weight, bias, groups=groups, **options)  # type: ignore[no-any-return]


class ConvTranspose(Conv):
    """A transposed convolution, W (in, out / g, k ...): B (in, r, 1 ...) mixes, A (g r, out / g, k ...) spreads.

    `dW[i, o, k] = sum_r B[i, r] A[r, o, k]` in each group, so the update is `A^T (B^T x)`.
    """

    placing = (*Conv.placing, "output_padding")

    def apply(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix channels, then spread."""
        return self._convolve(getattr(F, self.kind)(x, b, groups=self.groups), a, self.groups, bias)

    def norm(self, weight: Tensor) -> Tensor:
        """Of each output channel of each group."""
        by_group = weight.reshape(self.groups, -1, *self.shape[1:]).transpose(1, 2)
        return _lengths(by_group.flatten(2)).flatten()

    def by_weight(self, scale: Tensor) -> Tensor:
        """Each group of inputs has its own outputs."""
        rows = scale.reshape(self.groups, 1, self.shape[1]).expand(-1, self.shape[0] // self.groups, -1)
        return rows.reshape(*self.shape[:2], *[1] * (len(self.shape) - 2))


def form_of(kind: str, shape: torch.Size, options: dict[str, Any]) -> Form:
    """The form of a layer by the function that it comes down to."""
    classes: dict[str, type[Form]] = {"linear": Linear, "matmul": Matmul, "embedding": Embedding}
    if kind == "weight" and len(shape) == 3:
        return Experts(kind, tuple(shape), options)
    made = ConvTranspose if kind.startswith("conv_transpose") else Conv if kind.startswith("conv") else Form
    return classes.get(kind, made)(kind, tuple(shape), options)


def _lengths(rows: Tensor) -> Tensor:
    """Along the last axis; never zero, since DoRA divides by it, and some layers start at zero."""
    length: Tensor = torch.linalg.norm(rows, dim=-1)
    return length.clamp_min(torch.finfo(rows.dtype).tiny)
