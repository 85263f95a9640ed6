"""Code that only looks like a fault: nothing is found in it, and the fault beside it still is."""

from __future__ import annotations

import pytest

from fxopt.findings.search import subject_of
from passes.audit import Audit

CLASS = """
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
    "a clamp by the type": (
        "FX301",
        "",
        "return self.fc(x).abs().clamp(\n    min=torch.finfo(x.dtype).tiny\n).log()",
        False,
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
    "not kept": ("FX602", "", "self.size = x.shape[0]\nx.square().mean()\nreturn self.fc(x)", True),
    "without gradients": ("FX603", "", NO_GRAD, False),
    "in fewer bits": ("FX603", "", AUTOCAST, False),
    "before and after": ("FX603", "", f"{NO_GRAD} + self.fc(x).tanh()", True),
}


@pytest.mark.parametrize(("rule", "init", "forward", "found"), CODE.values(), ids=CODE)
def test_only_the_fault_is_found(rule, init, forward, found, write):
    assert (rule in rules(write, init, forward)) is found
