"""A convolution or linear layer together with what was fused around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.modules.activation import Activation
from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.functional import tail
from fxopt.modules.mask import Mask
from fxopt.modules.rebuild import rebuild

BatchNorm = nn.modules.batchnorm._BatchNorm


class Fused(nn.Module):
    """activation( bn( op(x, Q(M W)) + b ) + other ), each part but op optional.

    The mixin of `FusedConv2d` and its kin. They are still a `torch.nn.Conv2d` (and so on) and keep its
    parameters under their names: `conv1.weight` stays `conv1.weight`.

    With both `bn` and `weight_fake_quant` the weight is quantised as it will be once the batch norm is
    folded, by the running statistics, and the scale is divided out again before `bn` normalises:

        s = gamma / sqrt(var + eps);  y = bn( op(x, Q(W s)) / s + b )

    Where `bn` is at rest, that is what is computed: op(x, Q(W s)) + (b - mean) s + beta, bit by bit what
    `quantize-freeze` leaves. (Jacob et al. 2018, section 3.2; Krishnamoorthi 2018.)

    Attributes:
        activation: what is applied last, or None.
        norm_frozen: whether `bn` normalises by its running statistics in training too, and leaves them be.
        adds: whether `forward` takes a second tensor that is added before the activation.
        bn: the batch norm of the training form; its state sits under `conv1.bn.`, and state under its
            former name still loads.
        weight_fake_quant: what quantises the weight, or None.
        input_fake_quant: what quantises the input, where no graph could show it, or None.
        inner_fake_quant: what quantises the output of the operator before the addition and activation, or None.
        weight_mask: what holds part of the weight at zero, or None.
        reads: the quantisers of its input, one for each place that calls it, where kernels of integers hold the
            bias as an integer too: a multiple of the product of both scales (Jacob et al. 2018, section 2.4).
            Several have several products, so that the bias stays as it is.
    """

    stays_whole: ClassVar[bool] = True

    activation: Activation | None
    adds: bool
    norm_frozen: bool = False
    reads: tuple[FakeQuantize, ...] = ()
    weight: torch.Tensor
    bias: Any  # a Parameter or None; the plain classes disagree on how to say so
    channel_axis: ClassVar[int] = 0
    """The axis of the weight that counts output channels (of one group)."""

    @staticmethod
    def of(
        module: nn.Module,
        *,
        activation: Activation | None = None,
        adds: bool = False,
        bn: BatchNorm | None = None,
        weight_fake_quant: FakeQuantize | None = None,
        input_fake_quant: FakeQuantize | None = None,
        inner_fake_quant: FakeQuantize | None = None,
        weight_mask: Mask | None = None,
    ) -> Fused:
        """The fused form of `module`, with the same parameters and, if it is fused already, all that it holds."""
        kind = next(fused for plain, fused in _FORMS.items() if isinstance(module, plain))
        fused: Fused = rebuild(module, kind)
        held = module if isinstance(module, Fused) else None
        fused.activation = activation or (held.activation if held is not None else None)
        fused.adds = adds or (held is not None and held.adds)
        parts: dict[str, nn.Module | None] = {"bn": bn, "weight_mask": weight_mask}
        parts |= {"weight_fake_quant": weight_fake_quant}
        parts |= {"input_fake_quant": input_fake_quant, "inner_fake_quant": inner_fake_quant}
        fused._modules.update({name: part for name, part in parts.items() if part is not None})
        return fused

    @property
    def bn(self) -> BatchNorm | None:
        """The batch norm of the training form."""
        return cast("BatchNorm | None", self._modules.get("bn"))

    @property
    def weight_fake_quant(self) -> FakeQuantize | None:
        """What quantises the weight."""
        return cast("FakeQuantize | None", self._modules.get("weight_fake_quant"))

    @property
    def input_fake_quant(self) -> FakeQuantize | None:
        """What quantises the input, where no graph could show it."""
        return cast("FakeQuantize | None", self._modules.get("input_fake_quant"))

    @property
    def inner_fake_quant(self) -> FakeQuantize | None:
        """What quantises the output of the operator before anything is added or activated."""
        return cast("FakeQuantize | None", self._modules.get("inner_fake_quant"))

    @property
    def is_bare(self) -> bool:
        """Whether nothing follows the operator: its output is the affine map itself."""
        return self.activation is None and not self.adds and self.bn is None

    def forward(
        self, input: torch.Tensor, other: torch.Tensor | None = None, output_size: Sequence[int] | None = None
    ) -> torch.Tensor:
        """All parts in order; `other` is there if and only if `adds`."""
        if self.input_fake_quant is not None:
            input = self.input_fake_quant(input)
        out = self._affine(input, output_size)
        if self.inner_fake_quant is not None:
            out = self.inner_fake_quant(out)
        if self.adds and other is None:
            raise TypeError(f"{type(self).__name__} adds: its forward needs 'other'")
        return tail(out, other if self.adds else None, self.activation)

    def _normalized(self, out: torch.Tensor, bn: BatchNorm) -> torch.Tensor:
        if not self.norm_frozen or bn.running_var is None:
            return cast(torch.Tensor, bn(out))
        return F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)

    def _norm_rests(self, bn: BatchNorm) -> bool:
        return bn.running_var is not None and (self.norm_frozen or not bn.training)

    def folding_scale(self) -> torch.Tensor | None:
        """s of the formula above, a factor for each output channel; None without `bn`."""
        if self.bn is None or self.bn.running_var is None:
            return None
        scale: torch.Tensor = torch.rsqrt(self.bn.running_var + self.bn.eps)
        if self.bn.affine:
            scale = scale * self.bn.weight
        return scale

    def scaled_weight(self) -> torch.Tensor:
        """The weight that `weight_fake_quant` sees: as it is, or as folding the batch norm makes it."""
        scale, weight = self.folding_scale(), self.masked_weight()
        return weight if scale is None else weight * self._by_channel(_without_zeros(scale))

    def folded_weight(self) -> torch.Tensor:
        """Q(W s), or Q(W) without `bn`."""
        assert self.weight_fake_quant is not None
        scale = self.folding_scale()
        weight: torch.Tensor = self.weight_fake_quant(self.scaled_weight())
        # A channel that gamma switched off is quantised as it is, and nothing of it is left.
        return weight if scale is None else weight * self._by_channel(_without_zeros(scale) == scale)

    def folded_bias(self) -> torch.Tensor | None:
        """(b - mean) s + beta, or b without `bn`; rounded where integer kernels round it."""
        bn, scale = self.bn, self.folding_scale()
        bias: torch.Tensor | None = self.bias
        if bn is not None and scale is not None:
            assert bn.running_mean is not None
            bias = -bn.running_mean if bias is None else bias - bn.running_mean
            bias = bias * scale
            if bn.affine:
                bias = bias + bn.bias
        weight = self.weight_fake_quant
        if bias is None or weight is None or len(self.reads) != 1 or not (self.reads[0].rounds and weight.rounds):
            return bias
        step = self.reads[0].step * weight.step_of_bytes
        rounded = ((bias / step).round() * step).to(bias.dtype)
        return rounded.detach() + (bias - bias.detach())  # straight through

    def settle_bias(self) -> None:
        """Give the bias the value that `folded_bias` has, for good."""
        bias = self.folded_bias()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), self.bias.requires_grad)
        self.reads = ()

    def masked_weight(self) -> torch.Tensor:
        """The weight with zeros where `weight_mask` has them."""
        # No property of that name: torch.nn.utils.prune asks for it, and sets it where there is none.
        mask = cast("Mask | None", self._modules.get("weight_mask"))
        return self.weight if mask is None else cast(torch.Tensor, mask(self.weight))

    def _affine(self, input: torch.Tensor, output_size: Sequence[int] | None) -> torch.Tensor:
        """All before anything is added or activated."""
        if self.weight_fake_quant is None:
            out = self._operate(input, self.masked_weight(), self.bias, output_size)
        elif self.bn is None or self._norm_rests(self.bn):
            return self._operate(input, self.folded_weight(), self.folded_bias(), output_size)
        else:
            weight, scale = self.weight_fake_quant(self.scaled_weight()), self.folding_scale()
            weight = weight if scale is None else weight / self._by_channel(_without_zeros(scale))
            out = self._operate(input, weight, self.bias, output_size)
        return out if self.bn is None else self._normalized(out, self.bn)

    def _by_channel(self, scale: torch.Tensor) -> torch.Tensor:
        """`scale`, one value an output channel, in a shape that multiplies the weight."""
        return scale.reshape(-1, *[1] * (self.weight.dim() - 1)).to(self.weight.dtype)

    def _operate(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        output_size: Sequence[int] | None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """That of the plain module, and what is fused."""
        parts = [super().extra_repr()]
        if self.adds:
            parts.append("adds=True")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        return ", ".join(filter(None, parts))


def _without_zeros(scale: torch.Tensor) -> torch.Tensor:
    """A factor that can be divided by again: 1 for a channel that gamma switched off."""
    return torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


class FusedLinear(Fused, nn.Linear):
    """`torch.nn.Linear` with what is fused around it."""

    def _operate(self, input, weight, bias, output_size):  # type: ignore[no-untyped-def]
        return F.linear(input, weight, bias)


class _FusedConv(Fused):
    def _operate(self, input, weight, bias, output_size):  # type: ignore[no-untyped-def]
        return self._conv_forward(input, weight, bias)  # type: ignore[operator]


class FusedConv1d(_FusedConv, nn.Conv1d):
    """`torch.nn.Conv1d` with what is fused around it."""


class FusedConv2d(_FusedConv, nn.Conv2d):
    """`torch.nn.Conv2d` with what is fused around it."""


class FusedConv3d(_FusedConv, nn.Conv3d):
    """`torch.nn.Conv3d` with what is fused around it."""


class _FusedTranspose(Fused, nn.modules.conv._ConvTransposeNd):
    channel_axis = 1
    spatial: ClassVar[int]

    def _operate(self, input, weight, bias, output_size):  # type: ignore[no-untyped-def]
        stride: Any = self.stride
        crop: Any = self.padding
        kernel: Any = self.kernel_size
        dilation: Any = self.dilation
        padding = self._output_padding(input, output_size, stride, crop, kernel, self.spatial, dilation)
        operator: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        return operator(input, weight, bias, stride, crop, padding, self.groups, dilation)

    def _by_channel(self, scale: torch.Tensor) -> torch.Tensor:
        # The weight is (in, out / groups, ...): each group of inputs has its own outputs.
        inputs, outputs = self.weight.shape[:2]
        rows = scale.reshape(self.groups, 1, outputs).expand(self.groups, inputs // self.groups, outputs)
        return rows.reshape(inputs, outputs, *[1] * (self.weight.dim() - 2)).to(self.weight.dtype)


class FusedConvTranspose1d(_FusedTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose1d` with what is fused around it."""

    spatial = 1


class FusedConvTranspose2d(_FusedTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose2d` with what is fused around it."""

    spatial = 2


class FusedConvTranspose3d(_FusedTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose3d` with what is fused around it."""

    spatial = 3


_FORMS: dict[type[nn.Module], type[Fused]] = {
    nn.Linear: FusedLinear,
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
    nn.ConvTranspose1d: FusedConvTranspose1d,
    nn.ConvTranspose2d: FusedConvTranspose2d,
    nn.ConvTranspose3d: FusedConvTranspose3d,
}
