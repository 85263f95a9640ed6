"""FX403: weights whose scale doesn't fit the activation behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fxopt.findings import Finding, Precision
from passes.audit.evidence import Evidence
from passes.audit.evidence.forward import Step
from passes.audit.evidence.trail import init_place, place_of
from passes.audit.rule import Rule

_KNOWN: dict[str, Any] = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "leaky_relu": "leaky_relu"}
_KNOWN |= {"gelu": "relu", "silu": "relu", "elu": "relu", "relu_": "relu"}
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d")


def _activations(steps: list[Step]) -> dict[str, str]:
    """The activation that reads the output of each layer."""
    made = {number: step.module for step in steps if step.name in _LAYERS for number in step.outputs}
    reads = ((step.name, value.number) for step in steps if step.name in _KNOWN for value in step.inputs)
    return {made[number]: name for name, number in reads if number in made}


class InitGain(Rule):
    """Weights whose scale doesn't fit the activation behind them.

    Too large a gain saturates or explodes within some layers.

    Bad:
        nn.init.normal_(self.fc.weight, std=1.0)

    Good:
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")

    Fix: initialise by `kaiming_normal_` for ReLU, `xavier_normal_` for tanh and sigmoid.
    """

    id = "FX403"
    name = "init-gain"
    group = "training"
    precision = Precision.MEDIUM

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        activations = _activations(evidence.forward.steps) if evidence.forward else {}
        for path, module in evidence.modules:
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or path not in activations:
                continue
            weight = module.weight.detach()
            fan_in = weight[0].numel()
            if weight.is_meta or not weight.is_floating_point() or fan_in < 8:
                continue
            gain = float(weight.float().std()) * fan_in**0.5
            name = activations[path]
            wanted = nn.init.calculate_gain(_KNOWN[name])
            if gain > 4 * wanted:
                place = init_place(evidence, path) or place_of(evidence, path, "weight")
                yield self.found(
                    f"the gain of '{path}' is {gain:.1f}; '{name}' behind it wants {wanted:.1f}", place, path
                )
