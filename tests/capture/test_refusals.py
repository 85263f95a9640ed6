"""Checks of values that raise an error are kept in the graph; a decision after which the forward goes on is not."""

from __future__ import annotations

import linecache
import re
import textwrap
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

import fxopt
from fxopt.capture import capture
from fxopt.capture.guards import refuse
from fxopt.errors import GuardError
from tests.capture.agree import assert_same

GOOD = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])


def written(body: str) -> nn.Module:
    """A module whose forward of `x` is written in a file that lies nowhere."""
    source = f"import torch\ndef forward(self, x):\n{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"
    file = f"<python-input-{abs(hash(source))}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": "written"}
    exec(compile(source, file, "exec"), names)
    return type("Written", (nn.Module,), {"forward": names["forward"], "limit": 5})()


REFUSES = {
    "assert": "assert (x > 0).all(), 'not positive'\nreturn x",
    "assert not": "assert not (x <= 0).any()\nreturn x",
    "a number": "assert x.min().item() > 0\nreturn x",
    "a range": "assert 0 < x.min().item() < 9\nreturn x",
    "and": "assert x.min() > 0 and x.max() < 9\nreturn x",
    "raise": "if x.min() <= 0:\n    raise ValueError(f'{x.min()} is not positive')\nreturn x",
    "or": "if x.min() <= 0 or (x == 0).any():\n    raise ValueError\nreturn x",
    "else": "if bool((x > 0).all()):\n    y = x * 2\nelse:\n    raise IndexError('not positive')\nreturn y",
    "both": "if x.min() < 2 and (x <= 0).any():\n    raise ValueError('small')\nreturn x",
    "a plain question first": "if self.limit is not None and (x.min() <= 0).item():\n    raise ValueError\nreturn x",
    "torch's check": "torch._check(x.min().item() > 0)\nreturn x",
    "torch's check of a value": "torch._check_value(x.min().item() > 0, lambda: 'not positive')\nreturn x",
    "torch's check of all": "torch._check_tensor_all(x > 0)\nreturn x",
    "torch's assertion": "torch._assert((x > 0).all(), 'not positive')\nreturn x",
    "caught as another error": "try:\n    assert x.min() > 0\nexcept ValueError:\n    return -x\nreturn x",
    "a function": "def check(good, told):\n    if not good:\n        raise ValueError(told)\n"
    "check((x > 0).all(), 'not positive')\nreturn x",
    "equal tensors": "assert torch.equal(x, x.abs()) and 0 not in x\nreturn x",
}


@pytest.mark.parametrize("body", REFUSES.values(), ids=REFUSES)
def test_a_check_is_kept_and_refuses_what_the_module_refuses(body):
    module = written(body)
    captured = capture(module, (GOOD,))
    assert captured.coverage.call_sites == 1 and not captured.opaque and not captured.guards
    for x in (GOOD, GOOD[:1] + 1, torch.rand(5, 2) + 0.5):
        assert_same(captured.module(x), module(x))
    for bad in (-GOOD, GOOD - 1):
        with pytest.raises(Exception) as expected:
            module(bad)
        with pytest.raises(expected.type, match=r"the module refuses this input \(<python-input-\d+>:\d+\): .*x"):
            captured.module(bad)


GOES_ON = {
    "another way": "return x if x.min() > 0 else -x",
    "without raising": "if x.min() <= 0:\n    x = -x\nreturn x",
    "out of a loop": "for _ in range(2):\n    if x.min() <= 0:\n        break\n        raise ValueError\nreturn x",
    "where it is caught": "try:\n    assert x.min() > 0\nexcept AssertionError:\n    return -x\nreturn x",
    "where it is suppressed": "from contextlib import suppress\nwith suppress(KeyError, AssertionError):\n"
    "    assert x.min() > 0\n    return x\nreturn -x",
    "where a caller catches it": "def check():\n    if x.min() <= 0:\n        raise ValueError\n"
    "try:\n    check()\nexcept (KeyError, ValueError):\n    return -x\nreturn x",
    "out of what a loop asks for": "class Parts:\n    def __getitem__(self, i):\n"
    "        if x.min() <= 0 or i > 2:\n            raise IndexError\n        return x\n"
    "return x + len([part for part in Parts()])",
    "by one of several": "if x.min() <= 0 and x.max() > 5:\n    raise ValueError\nreturn x",
    "by a function of several": "assert any([x.min() <= 0, x.max() > 2])\nreturn x",
    "out of a range": "if 0 < x.min().item() < 1:\n    raise ValueError\nreturn x",
}


@pytest.mark.parametrize("body", GOES_ON.values(), ids=GOES_ON)
def test_what_goes_on_after_either_answer_stays_opaque(body):
    module = written(body)
    captured = capture(module, (GOOD,))
    assert captured.opaque
    for x in (GOOD, -GOOD, GOOD - 1):
        assert_same(captured.module(x), module(x))


def test_sizes_in_a_check_are_no_guards_where_the_check_refuses_only_together():
    module = written(
        "if x.shape[0] != 1 and x.shape[1] != 1 and x.shape[0] > x.shape[1]:\n    raise ValueError\nreturn x"
    )
    captured = capture(module, (GOOD,))
    assert not captured.guards
    for shape in ((1, 1), (1, 3), (3, 1), (3, 3)):
        assert captured.module(torch.ones(shape)).shape == shape
    with pytest.raises(ValueError, match="refuses this input"):
        captured.module(torch.ones(3, 2))


ATOMS = ("x.max() > 2", "(x < 1).any()", "x.sum().item() >= 4", "x.shape[0] > 2", "x.shape[1] == 3", "self.limit > 4")
TESTS = st.recursive(
    st.sampled_from(ATOMS),
    lambda parts: st.one_of(
        parts.map("not ({})".format),
        st.lists(parts, min_size=2, max_size=3).map(lambda all_: "({})".format(" and ".join(all_))),
        st.lists(parts, min_size=2, max_size=3).map(lambda all_: "({})".format(" or ".join(all_))),
    ),
    max_leaves=5,
)
INPUTS = [torch.full(shape, value) for shape in ((1, 3), (2, 3), (4, 3), (2, 2)) for value in (0.0, 0.75, 1.5, 3.0)]


@given(TESTS, st.booleans(), st.integers(0, len(INPUTS) - 1))
@settings(max_examples=60, deadline=None)
def test_whatever_a_check_asks_it_refuses_just_that(test, holds, example):
    module = written(f"assert {test}\nreturn x + 1" if holds else f"if {test}:\n    raise ValueError\nreturn x + 1")
    try:
        module(INPUTS[example])
    except (AssertionError, ValueError):
        return
    captured = capture(module, (INPUTS[example],))
    for x in INPUTS:
        try:
            found = captured.module(x)
        except GuardError:
            continue  # a size that the example does not have
        except (AssertionError, ValueError) as error:
            with pytest.raises(type(error)):
                module(x)
        else:
            assert_same(found, module(x))


class Policy(nn.Module):
    """Draws actions and tells how likely they are, as agents do."""

    def __init__(self, kind: type[torch.distributions.Distribution]):
        super().__init__()
        self.kind = kind
        self.body = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.body(x)
        made = self.kind(out[:, :3], out[:, 3:].exp()) if self.kind is Normal else self.kind(logits=out)
        action = made.sample()
        return action, made.log_prob(action)


@pytest.mark.parametrize("kind", [Normal, Categorical, Bernoulli])
def test_a_distribution_keeps_its_checks_and_takes_any_batch(kind, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns them off
    module = Policy(kind)
    captured = capture(module, (torch.randn(5, 4),))
    assert captured.coverage.call_sites == 1 and not captured.notes
    for batch in (1, 3):
        x = torch.randn(batch, 4)
        torch.manual_seed(0)
        expected = module(x)
        torch.manual_seed(0)
        assert_same(captured.module(x), expected)
    with pytest.raises(ValueError, match="the module refuses this input"):
        captured.module(torch.full((2, 4), torch.nan))


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if ids.max() >= 10:
            raise IndexError("no such word")
        if not torch.isfinite(mask).all():
            raise ValueError("mask")
        return self.head(self.embed(ids) * mask[..., None]).relu()


def test_compilers_follow_checks_of_tensors():
    module, given_ = Embeds().eval(), (torch.randint(10, (4, 6)), torch.ones(4, 6))
    captured = capture(module, given_).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(captured, fullgraph=True, backend="eager")
        assert_same(compiled(*given_), module(*given_))
        compiled = torch.compile(captured, backend="eager")
        with pytest.raises(RuntimeError, match=r"the module refuses this input .* raise ValueError"):
            compiled(given_[0], given_[1] * torch.nan)
    exported = torch.export.export(captured, given_).module()
    assert_same(exported(*given_), module(*given_))


def test_an_exported_model_says_which_checks_it_lacks():
    pytest.importorskip("onnxruntime")
    module, given_ = Embeds().eval(), (torch.randint(10, (4, 6)), torch.ones(4, 6))
    lowered = fxopt.lower(module, given_, engine="onnxruntime")
    (told,) = (skip.reason for skip in lowered.reasons)
    assert re.fullmatch(
        r"the exported model takes inputs that the module refuses at test_refusals.py:\d+, test_refusals.py:\d+", told
    )
    for batch in (1, 4, 6):
        again = torch.randint(10, (batch, 6)), torch.ones(batch, 6)
        torch.testing.assert_close(lowered(*again), module(*again))


def test_a_check_goes_through_symbolic_trace():
    module = written(REFUSES["both"])
    traced = torch.fx.symbolic_trace(capture(module, (GOOD,)).module)
    assert [node.target for node in traced.graph.nodes].count(refuse) == 1
    with pytest.raises(ValueError, match="refuses this input"):
        traced(GOOD - 1)
