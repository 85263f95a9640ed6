"""A model that computes in bfloat16, as closely as its bound on the error asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.engines.openvino.clamps import write_bfloat16, write_float32
from fxopt.engines.openvino.mixed import kept_in_float32, mark
from fxopt.engines.openvino.model import Model, shapes_of
from fxopt.engines.openvino.resize import keep_marks
from fxopt.engines.openvino.rounding import add_means, put_weights, rounded_weights
from fxopt.engines.openvino.session import plain
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.relative_error import relative_error

_SHARES = (0.0, 0.02, 0.1, 0.2, 0.4, 0.6, 0.75)
"""Of the layers, kept in float32 one after the other: with more of them little of the speed is left."""
_MARGIN = 0.9
"""Share of the bound that is used up on the inputs that were tried: others may do worse."""
_FRESH = 2
"""Random inputs that are tried beside the example."""


def compute_in_bfloat16(model: Model, inputs: Inputs) -> None:
    """Let a model compute in bfloat16, its weights rounded so that no mean moves.

    Args:
        model: in float32.
        inputs: an example, taken to be typical: the means are those of its values.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot run the model.
    """
    rounding = _Rounding.of(model, inputs, fresh=0)
    model.replace(rounding.model(()), "bf16")


def keep_layers(model: Model, inputs: Inputs, share: float) -> None:
    """See `compute_in_bfloat16`; here sums, normalisations, resizes and a share of the first layers stay in float32.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot run the model.
        EngineError: where this OpenVINO can't keep operators in float32.
    """
    keep_marks(model.read)
    _Rounding.of(model, inputs, fresh=0).keep(model, share)


def keep_enough_layers(model: Model, inputs: Inputs, max_error: float) -> float:
    """See `keep_layers`; here with the smallest share that holds a bound on the error with a margin, or the closest.

    Returns:
        The share.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot run the model.
        EngineError: see there, and where no share that OpenVINO compiles holds the bound.
    """
    keep_marks(model.read)
    rounding = _Rounding.of(model, inputs, fresh=_FRESH)
    errors: dict[float, float] = {}
    for share in _SHARES:
        rounding.keep(model, share)
        # Of a residual block OpenVINO cannot compile some parts in float32 and the others in bfloat16.
        with contextlib.suppress(RuntimeError):
            errors[share] = rounding.error(model)
            if errors[share] <= _MARGIN * max_error:
                return share
    if not errors:
        raise EngineError("engine 'openvino': it compiles this model in no mixed precision; give precision=f32 or bf16")
    best = min(errors, key=errors.__getitem__)
    if errors[best] > max_error:
        raise EngineError(
            f"engine 'openvino': with {100 * best:.0f} % of the layers in float32 its outputs differ by "
            f"{errors[best]:.2e} (allowed {max_error:g}); allow more, or give precision=f32"
        )
    rounding.keep(model, best)
    return best


@dataclass(frozen=True)
class _Rounding:
    """What is known of a model in float32 that is to be rounded.

    Attributes:
        read: it, as OpenVINO has read it.
        weights: in bfloat16, by the names of the layers that OpenVINO computes in it where it may.
        tries: inputs, and the outputs for each in float32.
    """

    read: Any
    weights: Mapping[str, torch.Tensor]
    tries: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]

    @classmethod
    def of(cls, model: Model, inputs: Inputs, fresh: int) -> _Rounding:
        read, outputs = model.read, len(model.read.outputs)
        telling = read.clone()
        layers = add_means(telling)
        model.replace(telling, "f32")
        tried = [plain(each) for each in (inputs, *map(inputs.fresh, range(1, fresh + 1)))]
        found = [model(tensors) for tensors in tried]
        model.replace(read, "bf16")
        rounded = _computed_in_bfloat16(model.session(shapes_of(tried[0])).compiled, layers)
        expected = [each[:outputs] for each in found]
        means = dict(zip(layers, found[0][outputs:], strict=True))
        return cls(read, rounded_weights(read, means, rounded), list(zip(tried, expected, strict=True)))

    def model(self, kept: Collection[str]) -> Any:
        """The model with rounded weights, but for the layers that are kept in float32."""
        found = self.read.clone()
        put_weights(found, {name: weight for name, weight in self.weights.items() if name not in kept})
        return found

    def keep(self, model: Model, share: float) -> None:
        """Let a model run in mixed precision."""
        kept = kept_in_float32(self.read, share)
        read = self.model(kept)
        write_bfloat16(read, kept)
        model.replace(read, "bf16")
        mark(model.core, read, kept | write_float32(read, kept))

    def error(self, model: Model) -> float:
        """The largest relative error of any output."""
        found = [zip(expected, model(tensors), strict=True) for tensors, expected in self.tries]
        return max(relative_error(want, got) for pairs in found for want, got in pairs)


def _computed_in_bfloat16(compiled: Any, layers: Collection[str]) -> set[str]:
    """Which of these layers a compiled model computes in bfloat16.

    Fused with its bias, a linear layer goes by another name: what is not said to be computed otherwise is taken for it.
    """
    precisions: dict[str, str] = {}
    for operator in compiled.get_runtime_model().get_ops():
        facts = operator.get_rt_info()
        names, precision = (facts[key].astype(str) for key in ("originalLayersNames", "runtimePrecision"))
        precisions.update(dict.fromkeys(names.split(","), precision))
    if "bf16" not in precisions.values():  # this CPU has no kernels for it
        return set()
    return {name for name in layers if precisions.get(name, "bf16") == "bf16"}
