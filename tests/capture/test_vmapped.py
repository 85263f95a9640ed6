"""What `torch.vmap` maps is in the graph, at other sizes too, and in copies of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fxopt.capture import capture
from tests.capture.odd import NestedVmap, Vmapped


@pytest.mark.parametrize("factory", [Vmapped, NestedVmap])
@pytest.mark.parametrize("duplicate", [lambda module: module, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_other_sizes(factory, duplicate):
    module = factory()
    captured = capture(module, (torch.randn(3, 4),))
    assert captured.opaque == () and captured.guards == ()
    for count in (3, 6):
        x = torch.randn(count, 4)
        expected, actual = module(x), duplicate(captured.module)(x)
        for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (expected, actual)), strict=True):
            assert torch.equal(one, other)


def test_parameters_beside_the_mapped_function_stay_in_sight():
    graph = capture(Vmapped(), (torch.randn(3, 4),)).module.graph
    (weight,) = [node for node in graph.nodes if node.op == "get_attr" and node.target == "weight"]
    (mapped,) = [node for node in graph.nodes if node.name.startswith("vmapped")]
    assert mapped.args[0] == (weight,)
