"""By how much each layer scales what it is given, and by how much the activation behind it wants it to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.audit.evidence.forward import Step, Value

LAYERS = ("linear", "conv1d", "conv2d", "conv3d")
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WANTS: dict[str, Any] = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "leaky_relu": "leaky_relu"}
_WANTS |= {"gelu": "relu", "silu": "relu", "elu": "relu", "relu_": "relu"}


@dataclass(frozen=True)
class Gain:
    """Of one layer.

    Attributes:
        module: qualified name.
        gain: standard deviation of the weights times the root of how many of them meet in one output.
        backward: the same of the gradient: times the root of how many outputs one input goes to.
        wanted: what keeps the variance of the signal through the activation behind.
        activation: its name; "" where none reads the output directly.
        corrected: whether a norm, or a sum with another path, comes before the output of the model, or no layer.
    """

    module: str
    gain: float
    backward: float
    wanted: float
    activation: str
    corrected: bool


def gains(modules: list[tuple[str, nn.Module]], steps: list[Step]) -> dict[str, Gain]:
    """All layers with enough weights to tell their scale, by name."""
    made = {number: step for step in steps if step.name in LAYERS for number in step.outputs}
    readers: dict[int, list[Step]] = defaultdict(list)
    for step in steps:
        for value in step.inputs if step.outputs else ():
            readers[value.number].append(step)
    makers = {step.module: step for step in made.values()}
    found = {}
    for path, module in modules:
        if not isinstance(module, _KINDS) or path not in makers or not module.weight.is_floating_point():
            continue
        weight = module.weight.detach()
        meeting = weight[0].numel()
        if weight.is_meta or meeting < 8:
            continue
        number = makers[path].outputs[0]
        name = next((each.name for each in readers[number] if each.name in _WANTS), "")
        wanted = nn.init.calculate_gain(_WANTS[name]) if name else 1.0
        deviation = float(weight.float().std())
        backward = deviation * (weight.shape[0] * weight[0][0].numel()) ** 0.5
        found[path] = Gain(path, deviation * meeting**0.5, backward, wanted, name, _corrected(number, readers))
    return found


def _corrected(number: int, readers: dict[int, list[Step]]) -> bool:
    """Whether each way on from a tensor meets a norm, or a step that joins it with another tensor.

    The last layers may start small: where no layer comes behind, there is nothing to correct.
    """
    waiting, seen, bare, layers = [number], {number}, False, 0
    while waiting:
        steps = readers[waiting.pop()]
        bare = bare or not steps
        for step in steps:
            if "norm" in step.name or (step.name not in LAYERS and len({v.number for v in _inputs(step)}) > 1):
                continue
            layers += step.name in LAYERS
            new = set(step.outputs) - seen
            seen |= new
            waiting += sorted(new)
    return not (bare and layers)


def _inputs(step: Step) -> list[Value]:
    return [value for value in step.inputs if value.floating]
