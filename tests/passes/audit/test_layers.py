"""Activations, gradients and gains of each layer, and the rules that judge by them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fxopt.findings import Subject, render
from fxopt.findings.render import layers as table
from fxopt.inputs import Inputs
from passes.audit import Audit
from passes.audit.evidence.spread import spread

X = torch.linspace(-2, 3, 48).view(6, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def inspected(module, x=X):
    return Audit().inspect(Subject("net", module, Inputs((x,))))


def test_each_module_is_measured():
    net = Net()
    by_name = {layer.module: layer for layer in inspected(net).layers}
    assert list(by_name) == ["fc1", "act", "fc2", ""]
    hidden = net.act(net.fc1(X)).detach()
    act = by_name["act"]
    assert (act.kind, act.low, act.high) == ("ReLU", 0.0, float(hidden.max()))
    assert act.mean == pytest.approx(float(hidden.mean()), rel=1e-5)
    assert act.variance == pytest.approx(float(hidden.var(correction=0)), rel=1e-5)
    assert act.zeros == pytest.approx(float((hidden == 0).float().mean()), rel=1e-5)
    assert act.gradient is None and act.gain is None
    fc1 = by_name["fc1"]
    assert fc1.gradient is not None and fc1.gradient > 0
    assert fc1.gain == pytest.approx(float(net.fc1.weight.detach().std()) * 8**0.5, rel=1e-5)
    assert fc1.wanted_gain == pytest.approx(2**0.5)


def test_a_module_that_runs_twice_is_measured_over_both():
    parts = (torch.randn(3, 4), 5 + torch.randn(2, 4))
    one, other = map(spread, parts)
    joined = one.joined(other)
    both = torch.cat(parts)
    assert joined.mean == pytest.approx(float(both.mean()), rel=1e-5)
    assert joined.variance == pytest.approx(float(both.var(correction=0)), rel=1e-5)
    assert (joined.low, joined.high) == (float(both.min()), float(both.max()))


def test_json_holds_the_numbers_and_no_nan():
    class Spoils(Net):
        def forward(self, x):
            return super().forward(x) * torch.inf

    plain = json.loads(render(inspected(Net()), Audit.rules(), "json"))["layers"]
    assert plain[0]["module"] == "fc1" and plain[0]["gain"] > 0
    spoiled = json.loads(render(inspected(Spoils()), Audit.rules(), "json"), parse_constant=pytest.fail)["layers"]
    assert spoiled[-1]["mean"] is None


def test_the_table_has_a_row_for_each():
    lines = table(inspected(Net()).layers).splitlines()
    assert lines[0].split() == "module class mean variance zeros lowest highest gradient gain wanted".split()
    assert [line.split()[0] for line in lines[2:]] == ["fc1", "act", "fc2", "the"]


def rules(module, x=X) -> set[str]:
    return {finding.rule for finding in inspected(module, x).findings}


class Deep(nn.Module):
    def __init__(self, std, residual=False, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 64)
        self.norm = nn.LayerNorm(64) if norm else nn.Identity()
        self.head = nn.Linear(64, 3)
        self.residual = residual
        nn.init.normal_(self.fc.weight, std=std)

    def forward(self, x):
        h = torch.relu(self.fc(x))
        h = h + x.repeat(1, 8) if self.residual else h
        return self.head(self.norm(h))


class FanOut(nn.Module):
    """A layer that narrows, initialised so that gradients keep their scale."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(8, 256), nn.Linear(256, 4), nn.Linear(4, 3)
        nn.init.kaiming_normal_(self.narrow.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        return self.head(torch.relu(self.narrow(self.wide(x))))


class Small(nn.Module):
    """A last layer that starts small, with an activation behind it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        nn.init.normal_(self.fc.weight, std=1e-2)

    def forward(self, x):
        return torch.tanh(self.fc(x))


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (Deep(1e-2), True),
        (Deep(5.0), True),
        (Deep(0.5), False),
        (FanOut(), False),
        (Deep(1e-2, residual=True), False),
        (Deep(1e-2, norm=True), False),
        (Small(), False),
    ],
)
def test_a_gain_is_judged_both_ways_unless_something_corrects_it(module, found):
    assert ("FX403" in rules(module)) is found


class Bounded(nn.Module):
    def __init__(self, function, scale):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.function, self.scale = function, scale

    def forward(self, x):
        return self.function(self.scale * self.fc(x))


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, lambda x: torch.softmax(x, -1)])
def test_saturation_is_found_where_it_is(function):
    assert "FX411" in rules(Bounded(function, 1e5))
    assert "FX411" not in rules(Bounded(function, 1.0))


@pytest.mark.parametrize(("dimension", "found"), [(-1, True), (0, False)])
def test_a_softmax_is_judged_along_its_own_dimension(dimension, found):
    logits = 50 * torch.eye(6, 8)  # two of eight columns are even, and no row is
    assert ("FX411" in rules(Bounded(lambda x: torch.softmax(0 * x + logits, dimension), 1.0))) is found


def test_a_signal_that_explodes_is_found():
    layers = [nn.Linear(8, 8) for _ in range(6)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=10.0)
    assert "FX412" in rules(nn.Sequential(*layers))


def test_a_head_of_zeros_is_no_lost_signal():
    net = Net()
    nn.init.zeros_(net.fc2.weight)
    assert "FX412" not in rules(net)


class Branches(nn.Module):
    """Residual branches that start as zeros, as many models have them."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))
        for branch in self.branches:
            nn.init.zeros_(branch[2].weight)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_branches_that_start_as_zeros_are_not_dead():
    assert not {"FX402", "FX407"} & rules(Branches())


def test_nothing_is_said_of_a_signal_before_batch_norms_have_seen_a_batch():
    def block():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())

    deep = nn.Sequential(*(block() for _ in range(20)), nn.Linear(8, 4))
    assert "FX412" not in rules(deep)


def test_an_operator_in_place_has_the_form_of_the_other():
    class Strided(Net):
        def forward(self, x):
            return super().forward(x.clone().as_strided_((6, 8), (8, 1)))

    assert "FX503" not in rules(Strided())


@pytest.mark.parametrize(("residual", "found"), [(False, True), (True, False)])
def test_gradients_that_vanish_towards_the_first_layer_are_found(residual, found):
    class Sigmoids(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(14))

        def forward(self, x):
            for layer in self.layers:
                x = residual * x + torch.sigmoid(layer(x))
            return x

    torch.manual_seed(0)
    assert ("FX408" in rules(Sigmoids())) is found


def test_a_branch_that_is_scaled_down_on_purpose_does_not_vanish():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch = nn.Linear(8, 8), nn.Linear(8, 8)
            self.gamma = nn.Parameter(1e-9 * torch.ones(8))

        def forward(self, x):
            x = self.stem(x)
            return x + self.gamma * (1e-8 * self.branch(x))

    assert "FX408" not in rules(Scaled())
