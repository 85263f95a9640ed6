"""What an engine is: a captured module goes in, something to call comes out."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fxopt.contract import Skip
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.relative_error import TOLERANCE

Run = Callable[..., Any]


class Sizes(enum.Enum):
    """Which sizes of the inputs may differ from those of the example."""

    ANY = "any"
    """All that the guards of the capture allow."""
    FREE = "free"
    """Those that an exporter left free; whether it did so rightly is asked of the module at new ones."""
    BATCH = "batch"
    """Dimension 0, where the tensors of the example agree on it."""
    FIXED = "fixed"
    """None."""


ASKED = Skip("", "whether it holds for other sizes is asked of the module at each new one; a saved file asks nothing")
"""Told of what `asks`."""


@dataclass(frozen=True)
class Built:
    """What an engine made of a module.

    Attributes:
        run: takes what the module takes and gives what it gives, without gradients.
        reasons: what the engine could not take, so that it runs as torch runs it, and why.
        choices: what was decided by measuring, as JSON can hold it; given back to `build`, nothing is measured.
        write: writes the engine's own form of the model into a directory; None where it has none.
        recorded: whether autograd would record what `run` does, and has to be kept from it.
        sizes: which may differ from those of the example, where that is less than the engine says; `reasons` tell why.
        asks: whether something that was decided while building may hold for some sizes alone, so that the module is run
            beside it at each new one.
        holds: copies of the module that `run` calls, where Python code may set attributes.
    """

    run: Run
    reasons: tuple[Skip, ...] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path], None] | None = None
    recorded: bool = True
    sizes: Sizes | None = None
    asks: bool = False
    holds: tuple[nn.Module, ...] = ()


class Engine(ABC):
    """Something that runs a captured module. Subclasses are frozen dataclasses; their fields are the options."""

    name: ClassVar[str]
    """What `fxopt.lower` and `--engine` call it."""
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    """Types of the devices that it runs on."""
    sizes: ClassVar[Sizes] = Sizes.ANY
    integers: ClassVar[bool] = False
    """Whether a quantised module runs on integers, whose sums may round to the neighbour of the simulated value."""

    def unavailable(self) -> str | None:
        """Why it cannot run here and which command would bring it; None where it can."""
        return None

    @abstractmethod
    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """Build for a module in evaluation mode, which is not changed.

        Args:
            module: captured, on the engine's device.
            inputs: an example of what it will be called with.
            choices: of an earlier build of the same module; empty to decide anew.

        Raises:
            EngineError: what the engine cannot take, and why.
        """

    def freed(self) -> Engine | None:
        """The engine, told to leave all sizes free where it would leave that of the batch; None for any other."""
        return None

    def in_vain(self, module: GraphModule) -> str | None:
        """What this machine lacks, so that fewer bits, in `module` or by an option, gain nothing; None otherwise."""
        return None

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative error that the engine may add to outputs of a dtype."""
        return TOLERANCE.get(dtype, 0.0)

    def within(self, max_error: float) -> Engine:
        """The engine, told how large a relative error of outputs may be; itself where that decides nothing."""
        return self
