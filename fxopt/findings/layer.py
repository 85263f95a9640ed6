"""What was measured of a layer, whether or not that is a fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """Numbers of one module, of one forward in evaluation and one backward in training.

    Attributes:
        target: what the command line calls the model.
        module: qualified name, "" for the root.
        kind: name of its class.
        mean: of all elements that it returned.
        variance: of them.
        zeros: share of those that are 0.
        low: the smallest.
        high: the largest.
        gradient: norm of the gradients of its own parameters, for a loss of random weights over the outputs; None
            where it has no parameters, or none gets a gradient.
        gain: by how much its weights scale a signal, one of a standard deviation of 1; None for other modules.
        wanted_gain: what the activation behind it wants.
    """

    target: str
    module: str
    kind: str
    mean: float
    variance: float
    zeros: float
    low: float
    high: float
    gradient: float | None = None
    gain: float | None = None
    wanted_gain: float | None = None
