"""Call sites, ties and swaps across the graphs of a program."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import nn

from fxopt.capture import capture
from fxopt.contract import Skip
from fxopt.graph import Affine, GraphModule, Program, Region, read_affine
from fxopt.modules import Fused, FusedLinear, rebuild
from tests.models import DYNAMIC, PairTwice, TiedHead


def program_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return Program(capture(model, inputs).module)


def calls(region: Region, name: str) -> list[fx.Node]:
    return [node for node in region.graph.nodes if node.op == "call_module" and node.target == name]


class TestSites:
    def test_all_calls_of_a_module(self) -> None:
        program = program_of(PairTwice().eval(), torch.randn(1, 4, 5, 5))
        (region,) = program.regions
        conv = region.module.get_submodule("conv")
        assert program.sites(conv) == calls(region, "conv")
        assert len(program.sites(conv)) == 2
        assert not program.is_exclusive(calls(region, "conv")[0], conv)

    def test_readers_see_ties(self) -> None:
        program = program_of(TiedHead().eval(), torch.randint(0, 20, (2, 3)))
        (region,) = program.regions
        weight = region.module.get_parameter("head.weight")
        assert [node.target for node in program.readers(weight)] == ["embed", "head"]
        assert program.names(weight) == ["embed.weight", "head.weight"]
        assert not program.is_exclusive(calls(region, "head")[0], region.module.get_submodule("head"))
        assert program.is_exclusive(calls(region, "body")[0], region.module.get_submodule("body"))

    def test_graphs_inside_opaque_parts(self) -> None:
        case = DYNAMIC["router"]
        program = program_of(case.build(), *case.example())
        inner = [region for region in program.regions if region.path.startswith("experts")]
        assert inner
        for region in inner:
            node = next(node for node in region.graph.nodes if node.op == "call_module")
            assert program.is_exclusive(node, region.submodule(node))
            assert region.qualified(node) == f"{region.path}.{node.target}"
            assert program.region_of(node) is region


class TestSwap:
    def test_the_only_site_keeps_its_name(self) -> None:
        program = program_of(TiedHead().eval(), torch.randint(0, 20, (2, 3)))
        (region,) = program.regions
        (node,) = calls(region, "body")
        old = region.submodule(node)
        new = rebuild(old, nn.Linear)
        assert region.swap(node, new) == "body"
        assert region.submodule(node) is new
        assert (program.sites(old), program.sites(new)) == ([], [node])
        assert new.training is False

    def test_one_of_two_sites_gets_a_clone(self) -> None:
        model, x = PairTwice().eval(), torch.randn(1, 4, 5, 5)
        program = program_of(model, x)
        (region,) = program.regions
        first, second = calls(region, "conv")
        old = region.submodule(first)
        new = rebuild(old, nn.Conv2d)
        assert region.swap(first, new) == "conv_1"
        assert region.submodule(second) is old
        assert (program.sites(old), program.sites(new)) == ([second], [first])
        assert program.readers(old.weight) == [second, first]
        region.module.recompile()
        assert torch.equal(region.module(x), model(x))

    def test_replace_module_reaches_every_name_and_site(self) -> None:
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)
                self.b = self.a

            def forward(self, x):
                return self.a(self.b(x))

        program = program_of(Two(), torch.randn(2, 4))
        old = program.root.get_submodule("a")
        sites = program.sites(old)
        new = Fused.of(old)
        program.replace_module(old, new)
        assert program.root.get_submodule("b") is program.root.get_submodule("a") is new
        assert program.sites(new) == sites
        assert program.readers(new.weight) == sites
        assert program.paths(new) == ["a", "b"]
        program.remove_module(new)
        assert not program.paths(new)

    def test_swap_parameter_reaches_ties(self) -> None:
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(4, 4), requires_grad=False)
                self.inner = nn.Module()
                self.inner.weight = self.weight

            def forward(self, x):
                return torch.nn.functional.linear(x, self.weight)

        program = program_of(Functional(), torch.randn(2, 4))
        (region,) = program.regions
        read = next(node for node in region.graph.nodes if node.op == "get_attr")
        region.swap_parameter(read, torch.zeros(4, 4))
        new = program.root.get_parameter("weight")
        assert new is program.root.get_parameter("inner.weight")
        assert not new.requires_grad
        assert read in program.readers(new)

    def test_edits_keep_names_and_readers_current(self) -> None:
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Linear(4, 4))
                self.weight = self.body[0].weight

            def forward(self, x):
                return torch.nn.functional.linear(self.body(x), self.weight)

        program = program_of(Tied(), torch.randn(2, 4))
        (region,) = program.regions
        (call,) = program.sites(program.root.get_submodule("body.0"))
        read = next(node for node in region.graph.nodes if node.op == "get_attr")
        region.swap_parameter(read, torch.zeros(4, 4))
        program.replace_module(program.root.get_submodule("body.0"), Fused.of(program.root.get_submodule("body.0")))
        new = program.root.get_parameter("weight")
        assert {*program.readers(new)} == {call, read}
        assert {*program.names(new)} == {"weight", "body.0.weight"}
        added = program.root.get_buffer(region.add_buffer("made.zeros", torch.zeros(1)))
        assert program.names(added) == ["made.zeros"]

    def test_new_names_are_free(self) -> None:
        program = program_of(nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4))
        (region,) = program.regions
        assert region.add_module("0", nn.ReLU()) == "0_1"
        assert region.add_module("made.deep.one", nn.ReLU()) == "made.deep.one"
        assert not any(module.training for module in region.module.modules())
        assert region.add_buffer("0.bias", torch.zeros(1), persistent=False) == "0.bias_1"
        assert region.add_parameter("made.scale", torch.ones(1), trainable=False) == "made.scale"


class Doubling(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class TestAffine:
    def read(self, layer: nn.Module) -> Affine | Skip | None:
        root = nn.Module()
        root.add_module("layer", layer)
        graph = fx.Graph()
        graph.output(graph.create_node("call_module", "layer", (graph.placeholder("x"),)))
        (region,) = Program(GraphModule(root, {False: graph})).regions
        return read_affine(calls(region, "layer")[0], region)

    def test_modules(self) -> None:
        layer = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        affine = self.read(layer)
        assert isinstance(affine, Affine)
        assert (affine.kind, affine.groups, affine.channel_axis, affine.out_channels) == ("conv_transpose2d", 2, 1, 6)
        assert affine.options["stride"] == (2, 2)
        assert affine.weight is layer.weight
        assert affine.is_bare

    def test_fused_modules(self) -> None:
        affine = self.read(Fused.of(nn.Linear(2, 3), adds=True))
        assert isinstance(affine, Affine)
        assert isinstance(affine.module, FusedLinear)
        assert not affine.is_bare

    def test_others(self) -> None:
        assert self.read(nn.ReLU()) is None

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda layer: layer.register_forward_hook(print), "it has a forward hook"),
            (lambda layer: layer.register_full_backward_hook(print), "it has a backward hook"),
            (lambda layer: setattr(layer, "forward", print), "its 'forward' is set on the instance"),
            (lambda layer: nn.utils.parametrizations.weight_norm(layer), "its parameters are parametrized: 'weight'"),
        ],
    )
    def test_what_must_stay(self, change: object, reason: str) -> None:
        layer = nn.Linear(2, 3)
        change(layer)  # type: ignore[operator]
        skip = self.read(layer)
        assert isinstance(skip, Skip)
        assert reason in skip.reason

    def test_a_subclass_with_its_own_forward_must_stay(self) -> None:
        skip = self.read(Doubling(2, 3))
        assert isinstance(skip, Skip)
        assert "its class 'Doubling' overrides 'forward' of Linear" in skip.reason
