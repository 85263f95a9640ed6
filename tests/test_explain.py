"""`fxopt explain` and what it prints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from fxopt.capture import Coverage, capture
from fxopt.explain import FORMS, explain, render
from tests.capture.odd import ODD
from tests.models import DYNAMIC, STATIC


def explained(name, form):
    case = {**STATIC, **DYNAMIC, **ODD}[name]
    module = case.build()
    return render(explain(capture(module, case.example(), case.kwargs), name, module), form)


def test_the_graph_by_module_with_shapes_and_lines():
    lines = [" ".join(line.split()) for line in explained("staged_cnn", "text").splitlines()]
    assert lines[0] == (
        "staged_cnn on 2x3x8x8 float32: 100% of the calls, 100% of the FLOPs, 100% of the parameters in graph"
    )
    assert "stages.0.1 (ResidualBlock)" in lines
    assert any(line.startswith("stem.conv Conv2d 2x8x8x8 float32 models.py:") for line in lines)


def test_opaque_parts_say_what_to_change():
    text = explained("router", "text")
    assert "stays as it is: it decides on a number that depends on the values of the input" in text
    assert "(models.py:" in text
    assert "to have it in the graph, compute it with tensors (torch.where, a mask, gather)" in text
    assert "experts.2 (Sequential)" in text


def test_constants_and_notes():
    assert "_constant_0: 4 float32 (models.py:" in explained("holder", "text")
    assert "hooks of 'block' were recorded into the graph" in explained("hooked", "markdown")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["encoder", "opaque_inside", "learnable_dropout"])
def test_all_forms(name, form):
    text = explained(name, form)
    assert text.endswith("\n")
    if form == "json":
        data = json.loads(text)
        assert data["coverage"].keys() == {"call_sites", "flops", "parameters"}
        assert data["parts"][0]["calls"]
    if form == "dot":
        assert text.startswith("digraph captured {")
        assert text.count("{") == text.count("}")


def test_a_share_reads_as_all_only_where_it_is():
    case = STATIC["staged_cnn"]
    explanation = explain(capture(case.build(), case.example()), "net", case.build())
    mostly = dataclasses.replace(explanation, coverage=Coverage(0.9996, 1.0, 0.0002))
    assert "99.9% of the calls, 100% of the FLOPs, 0.1% of the parameters" in render(mostly, "text")


def test_letters_stay_letters_in_a_drawing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.entrée = nn.Linear(3, 3)

        def forward(self, x):
            return self.entrée(x)

    module = Net()
    assert 'label="entrée' in render(explain(capture(module, torch.ones(1, 3)), "net", module), "dot")


def test_the_command(write):
    write("\nmodel = Net()\n")
    command = [sys.executable, "-m", "fxopt", "explain", "model.py:model", "--input", "2x3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fc Linear 2x4 float32 model.py:10" in " ".join(done.stdout.split())
    done = subprocess.run([*command, "--fake", "--format", "json"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["notes"] == ["captured without values: outputs were not compared"]
    write("\nclass Other(Net):\n    pass\n\nother = Other()\n", name="two.py")
    done = subprocess.run([*command[:4], "two.py:Other"], capture_output=True, text=True, check=False)
    assert "inputs: guessed 1x3 float32" in done.stdout
