"""Captured programs for the tests of passes, and what the pipeline does around a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.contract import Change, Pass, Skip
from fxopt.graph import GraphModule, Program, eliminate_dead


@dataclass
class Outcome:
    module: GraphModule
    changes: list[Change] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    @property
    def whats(self) -> list[str]:
        return [f"{change.where}: {change.what}" for change in self.changes]

    @property
    def reasons(self) -> list[str]:
        return [f"{skip.where}: {skip.reason}" for skip in self.skips]

    @property
    def calls(self) -> list[str]:
        """What is called, in order, without guards and sizes."""
        nodes = [node for node in self.module.graph.nodes if node.op.startswith("call_")]
        names = [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]
        return [name for name in names if not name.startswith("guard_")]


def captured(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    return capture(model, inputs, kwargs).module


def rewrite(pass_: Pass, module: GraphModule) -> Outcome:
    """Run a pass in place, as the pipeline does."""
    outcome = Outcome(module)
    for region in Program(module).regions:
        for item in pass_.run(region):
            (outcome.changes if isinstance(item, Change) else outcome.skips).append(item)
        eliminate_dead(region)
        region.graph.lint()
        region.module.recompile()
    return outcome


def run(pass_: Pass, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Outcome:
    return rewrite(pass_, captured(model, inputs, kwargs))


def leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert len(leaves(actual)) == len(leaves(expected))
    for mine, theirs in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
