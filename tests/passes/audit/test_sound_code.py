"""Code that only looks like a fault: nothing is found in it, and the fault beside it still is."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from fxopt.findings import Subject
from fxopt.findings.search import subject_of
from fxopt.inputs import Inputs
from passes.audit import Audit

CLASS = """
import random
import numpy
class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        {init}
    def forward(self, x):
        {forward}
"""


def rules(write, init: str, forward: str) -> set[str]:
    lines = forward.replace("\n", "\n        ")
    subject, notes = subject_of(f"{write(CLASS.format(init=init, forward=lines))}:Module", ["2x3"])
    assert notes == ()
    found = Audit().inspect(subject)
    assert found.notes == ()
    return {finding.rule for finding in found.findings}


IN_PLACE = "self.act, self.pre = nn.ReLU(inplace=True), True"
NORM = "self.bn = nn.BatchNorm1d(3)"
TWO_NORMS = "y = self.fc(x)\nreturn self.bn(y) + self.other(y)"
NO_GRAD = "y = self.fc(x).tanh()\nwith torch.no_grad():\n    z = self.fc(x).tanh()\nreturn y + z"
AUTOCAST = "y = self.fc(x).tanh()\nwith torch.autocast('cpu', torch.bfloat16):\n    z = self.fc(x).tanh()\nreturn y + z"
ACT = "self.act = nn.ReLU(inplace=True)"
ACTED = "x = self.fc(x)\ny = self.act(x)\n"
SCALE = """class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(4, 1))
            def forward(self, x):
                return self.weight * x[:, None]
        self.scale = Scale()"""
EACH = "return torch.stack([self.fc(x[i]) for i in range(n)])"
SHIFT = "s = torch.ones(3)\n"
NORMED = "return x / (x.norm(dim=-1, keepdim=True) + 1e-8)"
CODE = {
    "arms that exclude each other": (
        "FX107",
        IN_PLACE,
        "x = self.fc(x)\nif self.pre:\n    y = self.fc(self.act(x))\nelse:\n    y = self.fc(x)\nreturn y",
        False,
    ),
    "an expression of two arms": (
        "FX107",
        IN_PLACE,
        "x = self.fc(x)\ny = self.fc(self.act(x)) if self.pre else self.fc(x)\nreturn y",
        False,
    ),
    "an arm that returns": (
        "FX107",
        IN_PLACE,
        "x = self.fc(x)\nif self.pre:\n    y = self.act(x)\n    return self.fc(y)\nreturn self.fc(x)",
        False,
    ),
    "behind the arms": (
        "FX107",
        IN_PLACE,
        "x = self.fc(x)\nif self.pre:\n    y = self.act(x)\nelse:\n    y = self.fc(x)\nreturn y + self.fc(x)",
        True,
    ),
    "its shape alone": ("FX107", ACT, f"{ACTED}return y.view(x.shape[0], x.size(1)).to(x.dtype)", False),
    "its length alone": ("FX107", ACT, f"{ACTED}return y.view(len(x), -1) + torch.zeros_like(x)", False),
    "deleted": ("FX107", ACT, f"{ACTED}del x\nreturn y", False),
    "a view of it": ("FX107", ACT, f"{ACTED}return y + x.view(x.shape)", True),
    "its other name": ("FX107", ACT, "x = y = self.fc(x)\nshort = x\nx = self.act(x)\nreturn x + short", True),
    "what it was named after": ("FX107", ACT, "y = x = self.fc(x)\nout = x\nout = self.act(out)\nreturn out + x", True),
    "a name that was bound anew": ("FX107", ACT, "short = x\nx = self.fc(x)\nx = self.act(x)\nreturn x + short", False),
    "another name, by its shape": (
        "FX107",
        ACT,
        "x = self.fc(x)\ny = x\nx = self.act(x)\nreturn x.view(y.shape)",
        False,
    ),
    "a module without parameters": ("FX104", "", "return nn.Identity()(self.fc(x))", False),
    "a container of known modules": ("FX104", "", "return nn.Sequential(self.fc, nn.ReLU())(x)", False),
    "a container of new modules": ("FX104", "", "return nn.Sequential(self.fc, nn.Linear(3, 3))(x)", True),
    "a scale for each element": ("FX402", "self.norm = nn.LayerNorm((2, 3))", "return self.norm(self.fc(x))", False),
    "a scale for each channel": ("FX402", SCALE, "return self.scale(self.fc(x))", False),
    "units that are equal": ("FX402", "nn.init.ones_(self.fc.weight)", "return self.fc(x)", True),
    "an epsilon added in place": ("FX304", "", "n = x.var(-1, keepdim=True)\nn += 1e-5\nreturn self.fc(x) / n", False),
    "a clamp in place": ("FX302", "", "n = x.var(-1, keepdim=True)\nn.clamp_(1e-5)\nreturn x * n.sqrt()", False),
    "a root in place": ("FX302", "", "return self.fc(x) * x.var(-1, keepdim=True).sqrt_()", True),
    "infinity that is left out": (
        "FX306",
        "",
        "n = (x * 0).log()\nreturn self.fc(x) + torch.where(n < 0, 1, n)",
        False,
    ),
    "infinity that stays": ("FX306", "", "return self.fc(x) + (x * 0).log()", True),
    "an epsilon in float32": ("FX301", "", f"x = self.fc(x).float()\n{NORMED}", False),
    "an epsilon after float32": ("FX301", "", f"x = self.fc(x).float().tanh().type_as(x)\n{NORMED}", True),
    "a value beside a condition": ("FX501", "", "s = x.max().item() if not self.training else 2\nreturn s * x", False),
    "a value in a condition": ("FX501", "", "return self.fc(x) if x.max().item() > 0 else x", True),
    "a value in a comprehension": ("FX501", "", "s = [x.max().item() for _ in range(2)]\nreturn s[0] * x", False),
    "a clamp by the type": (
        "FX301",
        "",
        "return self.fc(x).abs().clamp(\n    min=torch.finfo(x.dtype).tiny\n).log()",
        False,
    ),
    "a clamp by the type, in a variable": (
        "FX301",
        "",
        "eps = torch.finfo(x.dtype).tiny\nreturn self.fc(x).abs().clamp(min=eps).log()",
        False,
    ),
    "a clamp by another type, in a variable": (
        "FX301",
        "",
        "eps = torch.finfo(torch.float32).tiny\nreturn self.fc(x).abs().clamp(min=eps).log()",
        True,
    ),
    "a clamp by another type": (
        "FX301",
        "",
        "return self.fc(x).abs().clamp(min=torch.finfo(torch.float32).tiny).log()",
        True,
    ),
    "a norm beside another reader": ("FX601", NORM, "y = self.fc(x)\nreturn self.bn(y) + y", False),
    "a norm of what is returned": ("FX601", NORM, "y = self.fc(x)\nreturn self.bn(y), y", False),
    "a norm behind one call of two": ("FX601", NORM, "return self.bn(self.fc(x)) + self.fc(-x)", False),
    "two norms": ("FX601", f"{NORM}\n        self.other = nn.BatchNorm1d(3)", TWO_NORMS, True),
    "kept on self": ("FX602", "", "self.loss = x.square().mean()\nreturn self.fc(x)", False),
    "kept on self later": ("FX602", "", "loss = x.square().mean()\nself.loss = loss\nreturn self.fc(x)", False),
    "printed": ("FX602", "", "print(x.square().mean())\nreturn self.fc(x)", False),
    "printed later": ("FX602", "", "loss = x.square().mean()\nprint(loss)\nreturn self.fc(x)", False),
    "given to torch alone": ("FX602", "", "torch.sqrt(x.square().mean())\nreturn self.fc(x)", True),
    "a cache that grows": (
        "FX505",
        "self.register_buffer('places', torch.arange(1.0), persistent=False)",
        "if len(self.places) < len(x):\n    self.places = torch.arange(float(len(x)))\n"
        "return self.fc(x) + self.places[:, None]",
        False,
    ),
    "a mean that runs": (
        "FX505",
        "self.register_buffer('mean', torch.zeros(3), persistent=False)",
        "if self.training:\n    self.mean += 0.1 * (x.mean(0) - self.mean)\nreturn self.fc(x) - self.mean",
        True,
    ),
    "functions in a list": ("FX102", "self.acts = [nn.ReLU(), nn.Flatten()]", "return self.acts[0](self.fc(x))", False),
    "a dropout in a list": ("FX102", "self.acts = [nn.Dropout()]", "return self.acts[0](self.fc(x))", True),
    "to a device in a variable": ("FX204", "self.place = 'cpu'", "return self.fc(x.to(self.place))", False),
    "to the device that is written": ("FX204", "", "return self.fc(x.to('cpu'))", True),
    "from numbers of Python": ("FX204", "", "return self.fc(x) * torch.FloatTensor([1, 2, 3])", False),
    "moved where the input is": ("FX202", "", f"{SHIFT}if x.is_cuda:\n    s = s.cuda()\nreturn self.fc(x) + s", False),
    "of the type for where the input is": (
        "FX202",
        "",
        f"{SHIFT}kind = torch.cuda.FloatTensor if x.is_cuda else torch.FloatTensor\nreturn self.fc(x) + s.type(kind)",
        False,
    ),
    "made of numbers, like the input": ("FX202", "", "return self.fc(x - x.new_tensor([1.0, 2.0, 3.0]))", False),
    "columns by a list": ("FX203", "", "x[:, [0]] = 1.0\nreturn self.fc(x[:, [2, 1, 0]])[[1, 0]]", False),
    "made of numbers": ("FX202", "", "return self.fc(x) + torch.tensor([1.0, 2.0, 3.0])", True),
    "made of an array": ("FX202", "", "return self.fc(x) + torch.from_numpy(numpy.ones(3))", True),
    "a hidden state": (
        "FX202",
        "self.rnn = nn.LSTM(3, 3)",
        "h = torch.zeros(1, 3)\nreturn self.rnn(self.fc(x), (h, h))[0]",
        True,
    ),
    "a device by what the machine has": (
        "FX201",
        "",
        "d = torch.device('cuda' if torch.cuda.is_available() else 'cpu')\nreturn self.fc(x.to(d))",
        True,
    ),
    "a device of a parameter": ("FX201", "", "d = self.fc.weight.device\nreturn self.fc(x.to(d))", False),
    "samples counted before": ("FX502", "", f"n = x.size(0)\nx = x * 2\n{EACH}", True),
    "samples counted with the rest": ("FX502", "", f"n, m = x.shape\n{EACH}", True),
    "steps of what was turned": ("FX502", "", f"x = x.T\nn = x.size(0)\n{EACH.replace('fc(x[i])', 'fc(x.T)')}", False),
    "the other dimension": ("FX502", "", f"m, n = x.shape\n{EACH.replace('x[i]', 'x')}", False),
    "chance of Python": ("FX405", "", "return self.fc(x) * random.random()", True),
    "chance of numpy": ("FX405", "", "return self.fc(x) + numpy.random.normal(0, 1)", True),
    "chance of Python in training": (
        "FX405",
        "",
        "return self.fc(x) * (random.random() if self.training else 1)",
        False,
    ),
    "chance that changes nothing": ("FX405", "", "random.random()\nreturn self.fc(x)", False),
    "a root of what was clamped to zero": ("FX302", "", "return self.fc(x).clamp(min=0).sqrt()", True),
    "a root of what was clamped above": ("FX302", "", "return self.fc(x).clamp(min=1e-4).sqrt()", False),
    "a log of what a sigmoid leaves": ("FX303", "", "return torch.log(1 - torch.sigmoid(self.fc(x)))", True),
    "a guarded log of what a sigmoid leaves": ("FX303", "", "return (1 - self.fc(x).sigmoid() + 1e-5).log()", False),
    "a product of norms": ("FX304", "", "return x / (x.norm() * self.fc(x).norm())", True),
    "a guarded product of norms": ("FX304", "", "return x / (x.norm() * self.fc(x).norm() + 1e-5)", False),
    "not kept": ("FX602", "", "self.size = x.shape[0]\nx.square().mean()\nreturn self.fc(x)", True),
    "without gradients": ("FX603", "", NO_GRAD, False),
    "in fewer bits": ("FX603", "", AUTOCAST, False),
    "before and after": ("FX603", "", f"{NO_GRAD} + self.fc(x).tanh()", True),
}


@pytest.mark.parametrize(("rule", "init", "forward", "found"), CODE.values(), ids=CODE)
def test_only_the_fault_is_found(rule, init, forward, found, write):
    assert (rule in rules(write, init, forward)) is found


def test_nothing_is_said_of_memory_before_it_is_written(write):
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        found = rules(write, "", "y = x.new_empty(x.shape)\ny.copy_(self.fc(x))\nreturn y")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not found & {"FX305", "FX306"}


DROPPED = {
    "layers": "if self.training and torch.rand(()) < 0.5:\n    return x\nreturn self.fc(x)",
    "layers by Python": "if self.training and random.random() < 0.5:\n    return x\nreturn self.fc(x)",
    "samples": "keep = torch.rand(len(x), 1) < 0.3 if self.training else 1.0\nreturn x + keep * self.fc(x)",
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_dropped_at_random_is_not_unused(name, write):
    source = CLASS.format(init="", forward=DROPPED[name].replace("\n", "\n        "))
    deep = "\nmodel = nn.Sequential(*(Module() for _ in range(4)))\n"
    subject, _ = subject_of(f"{write(source + deep)}:model", ["1x3"])
    assert not {"FX401", "FX407"} & {finding.rule for finding in Audit().inspect(subject).findings}


@pytest.mark.parametrize(("rule", "forward"), [("FX401", "return self.fc(x)"), ("FX406", "return self.fc(x) + T")])
def test_a_part_that_does_not_learn_is_told_of_once(rule, forward, write):
    init = "self.tower = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))"
    source = CLASS.format(init=init, forward=forward.replace("T", "self.tower(x).detach()"))
    subject, _ = subject_of(f"{write(source)}:Module", ["2x3"])
    found = [finding for finding in Audit().inspect(subject).findings if finding.rule == rule]
    assert [(finding.module, finding.message.partition(" ")[0]) for finding in found] == [("tower", "'tower'")]


@pytest.mark.parametrize(
    ("init", "forward", "severity"),
    [
        ("self.shift = torch.ones(3)", "return self.fc(x) + self.shift", "error"),
        ("self.shift = torch.ones(3)", "return self.fc(x) + self.shift.to(x.device)", "note"),
        (
            "self.shift = [torch.ones(3)]",
            "self.shift = [s.to(x) for s in self.shift]\nreturn x + self.shift[0]",
            "note",
        ),
        ("self.shift = torch.ones(3)", "return self.fc(x + self.shift) + self.shift.to(x.device)", "error"),
    ],
)
def test_a_tensor_that_the_forward_moves_fails_nowhere(init, forward, severity, write):
    source = CLASS.format(init=init, forward=forward.replace("\n", "\n        "))
    subject, _ = subject_of(f"{write(source)}:Module", ["2x3"])
    (finding,) = Audit().inspect(subject).findings
    assert (finding.rule, finding.severity.value) == ("FX101", severity)


LINES = {
    "behind parts of unknown number": (
        "parts = [nn.Linear(3, 3), nn.Linear(3, 3)]\n        nn.init.ones_(parts[1].weight)\n"
        "        self.seq = nn.Sequential(\n            *parts,\n            nn.ReLU(),\n        )",
        "FX402",
        "self.seq = nn.Sequential(",
        9,
    ),
    "behind letters of two bytes": ("", "FX304", "\u03c3 = self.fc(x); return \u03c3 / \u03c3.norm()", 32),
}


@pytest.mark.parametrize("name", LINES)
def test_the_place_is_that_of_the_fault(name, write):
    init, rule, line, column = LINES[name]
    forward = line if "return" in line else "return self.seq(self.fc(x))"
    path = write(CLASS.format(init=init, forward=forward))
    subject, _ = subject_of(f"{path}:Module", ["2x3"])
    (finding,) = (finding for finding in Audit().inspect(subject).findings if finding.rule == rule)
    assert Path(path).read_text().splitlines()[finding.place.line - 1].strip() == line
    assert finding.place.column == column


def test_a_class_is_not_taken_for_another_of_its_name(write):
    other = """
def make():
    class Module(nn.Module):
        def forward(self, x):
            return x.cuda()
    return Module
"""
    path = write(CLASS.format(init="", forward="return self.fc(x)") + other)
    subject, _ = subject_of(f"{path}:Module", ["2x3"])
    assert Audit().inspect(subject).findings == ()


def test_a_base_class_is_read_where_super_calls_it(write):
    source = CLASS.format(init="", forward="if x.is_cuda:\n            x = x.cuda()\n        return self.fc(x)")
    source += "\nclass Other(Module):\n    def forward(self, x):\n        return super().forward(x) + 1\n"
    subject, _ = subject_of(f"{write(source)}:Other", ["2x3"])
    assert [finding.rule for finding in Audit().inspect(subject).findings] == ["FX201"]


FUNCTION = """
import functools
from torch.nn import functional as F
def keep(function):
    return functools.wraps(function)(lambda *given: function(*given))
{above}
def helper(y):
    {body}
def outer(y):
    return helper(y)
"""
FUNCTIONS = {
    "a device": ("FX201", "y = y.cuda() if y.is_cuda else y\n    return y", True),
    "a new layer": ("FX104", "return nn.Linear(3, 3)(y)", True),
    "a write in place": ("FX107", "z = F.relu(y, inplace=True)\n    return y + z", True),
    "what is printed": ("FX602", "print(y.square().mean())\n    return y", False),
}


@pytest.mark.parametrize("above", ["", "@keep"], ids=["plain", "decorated"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_a_forward_calls_are_read(name, above, write):
    rule, body, found = FUNCTIONS[name]
    source = CLASS.format(init="", forward="return outer(self.fc(x))") + FUNCTION.format(body=body, above=above)
    subject, _ = subject_of(f"{write(source)}:Module", ["2x3"])
    assert (rule in {finding.rule for finding in Audit().inspect(subject).findings}) is found


def test_a_file_with_a_byte_order_mark_is_read(write):
    source = CLASS.format(init="self.scale = torch.ones(3)", forward="return self.scale * self.fc(x)")
    path = write(source, header="\ufeffimport torch\nfrom torch import nn\n")
    subject, _ = subject_of(f"{path}:Module", ["2x3"])
    (finding,) = Audit().inspect(subject).findings
    assert finding.place is not None and finding.fix is not None


def test_a_class_of_no_file_is_left_unread_and_told():
    space = {"__name__": "__main__", "nn": nn}
    exec("class Module(nn.Linear):\n    pass", space)
    with patch.object(sys.modules["__main__"], "__file__", None, create=True):
        found = Audit().inspect(Subject("x", space["Module"](3, 3), Inputs((torch.randn(2, 3),))))
    assert found.findings == ()
    assert found.notes == ("x: no file has the source of 'Module': rules that read it said nothing",)


def test_what_is_random_in_training_is_no_repetition(write):
    init, forward = "self.drop = nn.Dropout()", "return self.drop(self.fc(x)) + self.drop(self.fc(x))"
    subject, _ = subject_of(f"{write(CLASS.format(init=init, forward=forward))}:Module", ["2x3"])
    (finding,) = Audit().inspect(subject).findings
    assert (finding.rule, finding.message) == ("FX603", "'fc' computes the same once more")
