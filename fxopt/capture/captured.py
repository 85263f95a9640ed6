"""What capture hands on: the graph, and how much of the module it shows."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.graph import GraphModule
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Coverage:
    """How much of a module its graphs show, each a share from 0 to 1.

    Attributes:
        call_sites: of the torch calls that one forward makes.
        flops: of the floating-point operations of one forward.
        parameters: of the parameters (elements, each counted once).
    """

    call_sites: float
    flops: float
    parameters: float


@dataclass(frozen=True)
class Opaque:
    """A submodule that is kept as it is: its own Python code runs, between the graphs of its children.

    Attributes:
        path: qualified name; "" for the root.
        reason: what could not be captured.
        location: the user's line that did it, `model.py:88`.
    """

    path: str
    reason: str
    location: str


@dataclass(frozen=True)
class Guard:
    """Something that capture assumed about the inputs, and that each call checks.

    Attributes:
        assumption: in words of the user's code: `x.shape[2] == 224`.
        location: the user's line that decided on it.
    """

    assumption: str
    location: str


@dataclass(frozen=True)
class Constant:
    """A tensor that the module reads but has not registered; it was made part of the graph.

    Attributes:
        name: the buffer that holds it in the captured module.
        description: shape and dtype.
        location: the user's line that used it first.
    """

    name: str
    description: str
    location: str


@dataclass(frozen=True)
class Captured:
    """A module as a graph.

    Attributes:
        module: runs the graph; independent of the original module.
        inputs: the inputs it was captured with.
        coverage: how much of the original the graphs show.
        opaque: the parts that they do not show, with reasons.
        guards: what was assumed about the inputs.
        constants: unregistered tensors that were met.
        notes: what else a user should know, such as hooks that were recorded into the graph.
        seconds: wall time that capture took.
        forward_seconds: wall time of the forward that was recorded, with the cost of recording in it.
    """

    module: GraphModule
    inputs: Inputs
    coverage: Coverage
    opaque: tuple[Opaque, ...] = ()
    guards: tuple[Guard, ...] = ()
    constants: tuple[Constant, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    forward_seconds: float = 0.0
