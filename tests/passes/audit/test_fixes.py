"""The fixes that are made by themselves: they cure the fault, and leave all else on their lines as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.findings import patch
from fxopt.findings.search import subject_of
from passes.audit import Audit

CLASS = """
class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        {init}
    def forward(self, x):
        {forward}
"""
FIXED = {
    "buffer": (
        "FX101",
        "self.scale = torch.ones(4)  # one for each",
        "return self.fc(x) * self.scale",
        'self.register_buffer("scale", torch.ones(4))  # one for each',
    ),
    "buffer over several lines": (
        "FX101",
        "self.scale = torch.tensor(\n            [1.0, 2.0, 3.0, 4.0]  # by channel\n        )",
        "return self.fc(x) * self.scale",
        'self.register_buffer("scale", torch.tensor(\n            [1.0, 2.0, 3.0, 4.0]  # by channel\n        ))',
    ),
    "list": (
        "FX102",
        "self.layers = [nn.Linear(4, 4) for _ in range(2)]  # two",
        "return self.layers[1](self.layers[0](self.fc(x)))",
        "self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])  # two",
    ),
    "dictionary": (
        "FX102",
        'self.heads = {"a": nn.Linear(4, 2)}  # \u00e9',
        'return self.heads["a"](self.fc(x))',
        'self.heads = nn.ModuleDict({"a": nn.Linear(4, 2)})  # \u00e9',
    ),
    "device": (
        "FX202",
        "",
        "return self.fc(x) + torch.ones(4)  # shifted",
        "return self.fc(x) + torch.ones(4, device=x.device)  # shifted",
    ),
    "device behind a comma": (
        "FX202",
        "",
        "return self.fc(x) + torch.ones(4, )",
        "return self.fc(x) + torch.ones(4, device=x.device)",
    ),
    "the second device of a line": (
        "FX202",
        "",
        "return self.fc(x) + (torch.zeros(4, device=x.device) + torch.ones(4))",
        "return self.fc(x) + (torch.zeros(4, device=x.device) + torch.ones(4, device=x.device))",
    ),
    "device in a function": (
        "FX202",
        "",
        "return shifted(self.fc(x))\n\ndef shifted(y: torch.Tensor):\n    return y + torch.ones(4)",
        "    return y + torch.ones(4, device=y.device)",
    ),
    "two devices of a line": (
        "FX202",
        "",
        "return self.fc(x) + torch.ones(4) + (x[:, :1] + torch.zeros(4, ))",
        "return self.fc(x) + torch.ones(4, device=x.device) + (x[:, :1] + torch.zeros(4, device=x.device))",
    ),
    "two buffers of a line": (
        "FX101",
        "self.\u03c3 = torch.ones(4); self.\u03bc = torch.zeros(4)",
        "return self.fc(x) * self.\u03c3 + self.\u03bc",
        'self.register_buffer("\u03c3", torch.ones(4)); self.register_buffer("\u03bc", torch.zeros(4))',
    ),
    "behind a form feed": (
        "FX101",
        "\f\n        self.scale = torch.ones(4)",
        "return self.fc(x) * self.scale",
        'self.fc = nn.Linear(3, 4)\n        \f\n        self.register_buffer("scale", torch.ones(4))\n',
    ),
}


def audited(name: str):
    subject, notes = subject_of(f"{name}:Faulty", ["2x3"])
    assert notes == ()
    return Audit().inspect(subject).findings


@pytest.mark.parametrize("name", FIXED)
def test_a_fix_cures_the_fault(name, write):
    rule, init, forward, wanted = FIXED[name]
    path = write(CLASS.format(init=init, forward=forward))
    found = audited(path)
    assert rule in {finding.rule for finding in found}
    ((_, after),) = patch.patched(found).values()
    assert wanted in after
    Path("fixed.py").write_text(after, encoding="utf-8")
    assert audited("fixed.py") == ()


def of(init: str, forward: str = "return self.fc(x)") -> str:
    return CLASS.format(init=init, forward=forward)


SCALES = """
class Scales(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
    def forward(self, x):
        return x * self.scale
"""
MASKS = """
    def mask(self, n):
        return torch.ones(n)
"""
SHIFTS = """
class Shifts(nn.Module):
    def forward(self, parts):
        return parts[0] + torch.ones(4)
"""
LEFT = {
    "a list that holds more than modules": ("FX102", of("self.layers = [nn.Linear(4, 4), None]")),
    "a list of tuples": ("FX102", of("self.layers = [(nn.Linear(4, 4), nn.ReLU())]")),
    "keys that are no names": ("FX102", of("self.layers = {0: nn.Linear(4, 4)}")),
    "keys that the container has": ("FX102", of("self.layers = {'float': nn.Linear(4, 4)}")),
    "a method that the container lacks": (
        "FX102",
        of("self.layers = {'a': nn.Linear(4, 4)}\n        self.layers.setdefault('b', nn.Linear(4, 4))"),
    ),
    "pop with a default": ("FX102", of("self.layers = {'a': nn.Linear(4, 4)}\n        self.layers.pop('b', None)")),
    "a list that is repeated": (
        "FX102",
        of("self.layers = [nn.Linear(4, 4)]\n        self.twice = len(self.layers * 2)"),
    ),
    "a list by another name": (
        "FX102",
        of("self.layers = [nn.Linear(4, 4)]\n        a = self.layers\n        a.reverse()"),
    ),
    "a list that is asked for": (
        "FX102",
        of("self.layers = [nn.Linear(4, 4)]\n        assert type(self.layers) is list"),
    ),
    "a tensor before there are buffers": (
        "FX101",
        of("pass").replace("        super()", "        self.scale = torch.ones(4)\n        super()"),
    ),
    "a tensor that is moved at once": (
        "FX202",
        of("self.place = 'cpu'", "return self.fc(x) + torch.ones(4).to(self.place)"),
    ),
    "two tensors at once": ("FX101", of("self.mean, self.scale = torch.zeros(4), torch.ones(4)")),
    "a tensor with a gradient": ("FX101", of("self.scale = torch.ones(4, requires_grad=True)")),
    "an attribute of the class": ("FX101", of("self.scale = torch.ones(4)") + "    scale = None\n"),
    "numbers elsewhere": (
        "FX101",
        SCALES + of("self.a, self.b = Scales(2.0), Scales(torch.ones(4))", "return self.a(self.b(self.fc(x)))"),
    ),
    "parameters elsewhere": (
        "FX101",
        SCALES
        + of(
            "self.a, self.b = Scales(nn.Parameter(torch.ones(4))), Scales(torch.ones(4))",
            "return self.a(self.b(self.fc(x)))",
        ),
    ),
    "a device that is given": ("FX202", of("", "return self.fc(x) + torch.ones(4, device='cpu')")),
    "an argument that is a number": ("FX202", of("", "return self.fc(x) + self.mask(4)") + MASKS),
    "an argument that is bound anew": (
        "FX202",
        of("", "y, x = self.fc(x), [x]\n        return y + torch.ones(4)"),
    ),
    "an argument that is a list": ("FX202", SHIFTS + of("self.add = Shifts()", "return self.add([self.fc(x)])")),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_would_not_run_afterwards_is_left_alone(name, write):
    rule, source = LEFT[name]
    found = audited(write(source))
    assert {(finding.rule, finding.fix) for finding in found} == {(rule, None)}


@pytest.mark.parametrize(
    ("rule", "init", "forward"),
    [
        ("FX102", "self.layers = [nn.Linear(3, 3)]", "return self.fc(self.layers[0](x))"),
        ("FX102", "self._layers = {'a': nn.BatchNorm1d(3)}", "return self.fc(self._layers['a'](x))"),
        ("FX101", "self._scale = torch.ones(4)", "return self.fc(x) * self._scale"),
    ],
)
def test_what_is_not_registered_is_one_finding_though_it_meets_another_device_too(rule, init, forward, write):
    assert [finding.rule for finding in audited(write(of(init, forward)))] == [rule]


def test_what_is_installed_is_left_alone(write, monkeypatch):
    write(of("self.scale = torch.ones(4)"), name="site-packages/installed.py")
    monkeypatch.syspath_prepend("site-packages")
    found = audited(write("from installed import Faulty\n"))
    assert [(finding.rule, finding.fix) for finding in found] == [("FX101", None)]


@pytest.mark.parametrize("forward", ["torch.sigmoid(x)\n        return self.fc(x)", "return self.fc(x) + self.fc(x)"])
def test_what_installed_code_computes_for_nothing_is_no_finding(forward, write, monkeypatch):
    source = of("", forward)
    (finding,) = audited(write(source))
    assert finding.rule in ("FX602", "FX603")
    write(source, name="site-packages/wasteful.py")
    monkeypatch.syspath_prepend("site-packages")
    assert audited(write("from wasteful import Faulty\n")) == ()


def test_a_file_that_calls_torch_nn_otherwise_is_fixed_in_its_words(write):
    body = "class Faulty(layers.Module):\n    def __init__(self):\n        super().__init__()\n"
    body += "        self.parts = [layers.Linear(3, 3)]\n    def forward(self, x):\n        return self.parts[0](x)\n"
    found = audited(write(body, header="import torch.nn as layers\n\n\n"))
    ((_, after),) = patch.patched(found).values()
    assert "self.parts = layers.ModuleList([layers.Linear(3, 3)])" in after


SAVED = [
    ("net = Faulty()\n    torch.save(net, path)", True),
    ("net = nn.Linear(2, 2)\n    torch.save(net, path)", True),
    ("net = Faulty()\n    torch.save(net.state_dict(), path)", False),
    ("state = {'step': 1}\n    torch.save(state, path)", False),
    ("state = Counts()\n    torch.save(state, path)", False),
    ("weight = nn.Parameter(torch.ones(2))\n    torch.save(weight, path)", False),
    ("net = torch.ones(2)\n    torch.save(net, path)", False),
]


@pytest.mark.parametrize(("body", "found"), SAVED)
def test_a_whole_module_that_is_saved_is_found(body, found, write):
    source = CLASS.format(init="", forward="return self.fc(x)")
    others = "class Counts:\n    pass\ndef other():\n    net = Faulty()\n    return net\n"
    path = write(f"{source}\n{others}def keep(path):\n    {body}\n")
    places = [(each.rule, each.place and each.place.line) for each in audited(path)]
    lines = Path(path).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "torch.save" in text)
    assert places == ([("FX504", line)] if found else [])


def test_a_module_that_saves_itself_is_found(write):
    source = CLASS.format(init="", forward="return self.fc(x)")
    path = write(f"{source}\n    def keep(self, path):\n        torch.save(self, path)\n")
    assert [each.rule for each in audited(path)] == ["FX504"]


@pytest.mark.parametrize(("saved", "found"), [("self", []), ("self.net", ["FX504"]), ("self.steps", [])])
def test_what_a_trainer_saves_is_told_apart(saved, found, write):
    source = CLASS.format(init="", forward="return self.fc(x)")
    trainer = "class Trainer:\n    def __init__(self):\n        self.net = Faulty()\n        self.steps = dict()\n"
    path = write(f"{source}\n{trainer}    def keep(self, path):\n        torch.save({saved}, path)\n")
    assert [each.rule for each in audited(path)] == found
