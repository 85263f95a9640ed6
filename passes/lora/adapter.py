"""The modules that hold low-rank updates and apply them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.errors import PassError
from fxopt.modules import WithSettings
from passes.lora.forms import Form, Linear

BASE = "base"
"""The name that stands for no adapter in a mixed batch."""


@dataclass(frozen=True)
class Beside:
    """What is saved with an adapter, by qualified names relative to the captured module.

    Attributes:
        modules: those that train as a whole.
        tensors: parameters, and biases among them that train.
        bias: what PEFT calls the choice of these: `none`, `all`, `lora_only`.
    """

    modules: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    bias: str = "none"


_SETTINGS = ("rank", "alpha", "rslora", "dropout", "scale")
_TENSORS = ("A", "B", "magnitude", "bias", "mask", "start_a", "start_b")


class LowRank(WithSettings, nn.Module):
    """One update `s B A` of a weight.

    Args:
        a, b: the factors, in the shapes that the form of the layer gives them.
        rank: what alpha is divided by; with groups, that of one group.
        alpha: `s = alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (Kalajdzievski 2023).
        rslora: see alpha.
        dropout: probability with which training drops values of the input.

    Attributes:
        magnitude: DoRA's length of the weight of each output (Liu et al. 2024), or None.
        bias: what PEFT calls `lora_bias`, or None.
        mask: 1 where B may differ from zero, for slices of a fused weight, or None.
        start_a, start_b: the factors that were taken out of the base weight when the adapter was made, or None.
        beside: what is saved with it.
    """

    magnitude: nn.Parameter | None
    bias: nn.Parameter | None
    mask: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        *,
        rank: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.A = nn.Parameter(a, requires_grad=False)
        self.B = nn.Parameter(b, requires_grad=False)
        self.register_parameter("magnitude", None)
        self.register_parameter("bias", None)
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.dropout = dropout
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.beside = Beside()

    def settings(self) -> dict[str, Any]:
        """What its factors are multiplied with, how it trains, and what a file may bring.

        That is shapes of its tensors, and what is saved with it.
        """
        shapes = {key: None if (tensor := getattr(self, key)) is None else list(tensor.shape) for key in _TENSORS}
        return {**{key: getattr(self, key) for key in _SETTINGS}, "shapes": shapes, "beside": asdict(self.beside)}

    def set_to(self, settings: dict[str, Any]) -> None:
        """Set it to what `settings` gave; tensors of other shapes are to be filled then."""
        self.__dict__.update({key: settings[key] for key in _SETTINGS})
        beside = settings["beside"]
        self.beside = Beside(tuple(beside["modules"]), tuple(beside["tensors"]), beside["bias"])
        for key, shape in settings["shapes"].items():
            tensor = getattr(self, key)
            if shape is None:
                setattr(self, key, None)
            elif tensor is None or list(tensor.shape) != shape:
                made = self.A.new_zeros(shape)
                setattr(self, key, nn.Parameter(made, self.A.requires_grad) if key in self._parameters else made)

    @property
    def left(self) -> Tensor:
        """B, with what lies outside of its slices held at zero."""
        return self.B if self.mask is None else self.B * self.mask

    def extra_repr(self) -> str:
        """Rank, scale and options."""
        parts = [f"rank={self.rank}, scale={self.scale:.4g}"]
        parts += [f"dropout={self.dropout}"] if self.dropout else []
        parts += ["dora=True"] if self.magnitude is not None else []
        return ", ".join(parts)


class Adapter(WithSettings, nn.Module):
    """All adapters of one layer, by name, of which some are active.

    Args:
        form: of the layer.
        slot: qualified name of the parameter, relative to the captured module.
        name: what targets call the layer.

    Attributes:
        targets: all that targets may call the layer.
        operators: what the uses of its weight compute.
        bias_slot: the bias of the layer, where it has one.
        active: names of the adapters that count, each with a factor.
        edited: whether `load_adapter` edited the graph for it.
        merged: whether the weight holds the active adapters already.
        unmerged: the weight and the bias as they were before merging.
        batch: the adapter of each sample of a mixed batch; None where it is not mixed, () where none is to count.
        steps: in how many equal parts the update is added to a whole weight. Rounding tells one from two, and PEFT
            adds that of the output projection of an attention module twice.
    """

    stays_whole: ClassVar[bool] = True

    steps = 1

    def __init__(self, form: Form, slot: str, name: str):
        super().__init__()
        self.form = form
        self.slot = slot
        self.name = name
        self.targets: tuple[str, ...] = (name,)
        self.operators: tuple[str, ...] = (form.kind,)
        self.bias_slot: str | None = None
        self.active: tuple[tuple[str, float], ...] = ()
        self.edited = False
        self.merged = False
        self.batch: tuple[str, ...] | None = None
        self.unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None

    def settings(self) -> dict[str, Any]:
        """Which adapters count.

        Raises:
            PassError: the weight holds them, and what it was without them no file would have; or no pass made the graph
                that it is in.
        """
        if self.merged:
            raise PassError(
                f"the weight of '{self.name}' holds its adapters; call unmerge(module) first, or run 'lora-merge'"
            )
        if self.edited:
            raise PassError(
                f"no recipe makes the graph again that 'load_adapter' made for '{self.name}': run the pass 'lora' on "
                "it first, with 'dora' if the file has that; or keep the adapter as a file, by 'save_adapter', and "
                "load that anew"
            )
        return {"active": self.active, "batch": self.batch, "names": self.names}

    def set_to(self, settings: dict[str, Any]) -> None:
        """Set it to what `settings` gave; adapters that a file brought are to be set and filled then."""
        for name in settings["names"]:
            if name not in self:
                like = self[self.names[0]]
                self.add_module(name, LowRank(like.A.new_zeros(0), like.B.new_zeros(0), rank=1, alpha=1))
        self.active = tuple((name, factor) for name, factor in settings["active"])
        self.batch = None if settings["batch"] is None else tuple(settings["batch"])

    def __getitem__(self, name: str) -> LowRank:
        found = self._modules[name]
        assert isinstance(found, LowRank)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    @property
    def counting(self) -> list[tuple[LowRank, float]]:
        """The active adapters, each with its factor."""
        return [(self[name], factor) for name, factor in self.active]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that this layer has."""
        return tuple(self._modules)

    @property
    def takes_weight(self) -> bool:
        """Whether its calls have to give the weight of the layer beside its output, as one with DoRA needs it."""
        return False

    def folded(self, weight: Tensor, keep_zeros: bool = False) -> Tensor:
        """The weight with all active adapters in it, computed in float64.

        With `keep_zeros` it is `W + M * dW`, where M is 0 wherever W is: a sparse weight stays sparse.
        """
        total = weight.detach().double()
        mask = total != 0
        for low, factor in self.counting:
            update = self.form.delta(low.A.detach().double(), low.left.detach().double()) * (low.scale * factor)
            total = total + (update * mask if keep_zeros else update)
            if low.magnitude is not None:
                scale = low.magnitude.detach().double() / self.form.norm(total)
                total = total * self.form.by_weight(scale)
        return total.to(weight.dtype)

    def folded_bias(self, bias: Tensor) -> Tensor:
        """The bias of the layer with those of all active adapters in it."""
        total = bias.detach().double()
        for low, factor in self.counting:
            if low.bias is not None:
                total = total + low.bias.detach().double() * (low.scale * factor)
        return total.to(bias.dtype)

    def _with(self, low: LowRank, factor: float, weight: Tensor) -> Tensor:
        update = (self.form.delta(low.A, low.left) * (low.scale * factor / self.steps)).to(weight.dtype)
        for _ in range(self.steps):
            weight = weight + update
        if low.magnitude is not None:
            scale = low.magnitude / self.form.norm(weight.detach()).to(low.magnitude.dtype)
            weight = weight * self.form.by_weight(scale.to(weight.dtype))
        return weight


class LayerAdapter(Adapter):
    """y + s B (A x): what an adapter adds to the output of its layer.

    In inference the update is added in place: nothing else has seen the output of the layer. With DoRA

        y' = y + (g - 1) (y - b) + g s B (A x)        g = m / |W + s B A|

    which needs W and the bias b; the length is a constant for the gradient (Liu et al. 2024, section 4.3). W is the
    weight with the adapters that were added before.
    """

    def forward(self, x: Tensor, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Add the active adapters to `y`, the output of the layer for `x`."""
        if self.merged or self.batch == ():
            return y
        if self.batch is not None:
            return self._mixed(x, y, weight, bias)
        for position, (low, factor) in enumerate(self.counting):
            y = self._add(low, factor, x, y, weight, bias)
            if weight is not None and position + 1 < len(self.active):
                weight = self._with(low, factor, weight.detach())
                if low.bias is not None:
                    more = low.bias * (low.scale * factor)
                    bias = more if bias is None else bias + more
        return y

    def _add(
        self, low: LowRank, factor: float, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        a, b, scale = low.A, low.left, low.scale * factor
        drops = low.dropout > 0 and self.training and x.is_floating_point()
        if drops:
            x = F.dropout(x, low.dropout)
        if x.is_floating_point() and x.dtype is not a.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        if low.magnitude is not None:
            assert weight is not None
            if drops:
                base = self.form.base(x, weight.to(a.dtype))
            else:
                base = y if bias is None else y - self.form.by_output(bias)
            update = self.form.delta(a, b).detach()
            length = self.form.norm(weight.detach().to(update.dtype) + scale * update)
            gain = self.form.by_output(low.magnitude / length)
            return (y + ((gain - 1) * base + gain * self.form.apply(x, a, b) * scale)).to(y.dtype)
        if torch.is_grad_enabled() or low.bias is not None:
            return (y + self.form.apply(x, a, b, low.bias) * scale).to(y.dtype)
        if math.frexp(scale)[0] != 0.5:  # the product with another scale rounds, and fused with the sum it would not
            return y.add_(self.form.apply(x, a, b).mul_(scale).to(y.dtype))
        if isinstance(self.form, Linear) and y.is_contiguous():
            inner = F.linear(x, a)
            if inner.dtype is y.dtype and b.dtype is y.dtype:
                y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), b.t(), alpha=scale)
                return y
        return y.add_(self.form.apply(x, a, b).to(y.dtype), alpha=scale)

    def _mixed(self, x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert self.batch is not None
        # GPT-2 and others flatten samples and positions into rows: those of one sample stay together.
        each_rows, left = divmod(x.shape[0], len(self.batch))
        if left or not each_rows:
            raise PassError(f"lora: the mixed batch names {len(self.batch)} samples, '{self.name}' got {x.shape[0]}")
        rows_of = [name for name in self.batch for _ in range(each_rows)]
        out = y.clone()
        for name in dict.fromkeys(self.batch):
            if name in self:
                rows = torch.tensor([i for i, each in enumerate(rows_of) if each == name], device=x.device)
                out = out.index_copy(0, rows, self._add(self[name], 1.0, x[rows], y[rows], weight, bias))
        return out

    @property
    def takes_weight(self) -> bool:
        """Whether any of its adapters is one with DoRA."""
        return any(self[name].magnitude is not None for name in self.names)


class WeightAdapter(Adapter):
    """W + s B A: for weights that something else than a known layer uses.

    Attributes:
        inner: path of the weight in the module that is called as one; "" where a graph reads the weight.
    """

    inner: str = ""

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the active adapters in it."""
        if self.batch and set(self.batch) != {BASE}:
            raise PassError(f"lora: '{self.name}' is adapted as a whole weight, which a mixed batch can't be")
        for low, factor in () if self.merged or self.batch is not None else self.counting:
            weight = self._with(low, factor, weight)
        return weight


def can_be_called(name: str) -> bool:
    """Whether an adapter may have a name: it is that of a child of what applies it, and `base` stands for none."""
    kinds = (kind(Form("weight", ()), "", "") for kind in (LayerAdapter, WeightAdapter))
    return bool(name) and "." not in name and name != BASE and not any(hasattr(each, name) for each in kinds)
