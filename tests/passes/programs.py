"""Captured programs for the tests of passes, and what the pipeline does around a pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxopt.contract import Change, Pass, Skip
from fxopt.graph import GraphModule, Program, eliminate_dead, observe


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
        return [node.target if isinstance(node.target, str) else node.target.__name__ for node in nodes]


def captured(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> GraphModule:
    owner = copy.deepcopy(model)
    graph = fx.Tracer().trace(owner)
    for child in owner.modules():
        for name in [name for name, value in vars(child).items() if isinstance(value, torch.Tensor)]:
            value = child.__dict__.pop(name)
            child.register_buffer(name, value, persistent=False)
    program = GraphModule(owner, {model.training: graph}, type(model).__name__)
    return shaped(program, inputs, dict(kwargs or {}))


def shaped(program: GraphModule, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> GraphModule:
    """Note the shape and dtype of each value, without a trace in the statistics of `program`."""
    metas = {}

    def visit(_: GraphModule, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            metas[node.name] = _extract_tensor_metadata(value)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        observe(copy.deepcopy(program), inputs, kwargs, visit)
    for node in program.graph.nodes:
        if node.name in metas:
            node.meta["tensor_meta"] = metas[node.name]
    return program


def rewrite(pass_: Pass, module: GraphModule) -> Outcome:
    """Run a pass in place, as the pipeline does."""
    outcome = Outcome(module)
    for region in Program(module).regions:
        for item in pass_.run(region):
            (outcome.changes if isinstance(item, Change) else outcome.skips).append(item)
        eliminate_dead(region)
        region.graph.lint()
    module.recompile()
    return outcome


def run(pass_: Pass, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Outcome:
    return rewrite(pass_, captured(model, inputs, kwargs))


def leaves(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert len(leaves(actual)) == len(leaves(expected))
    for mine, theirs in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
