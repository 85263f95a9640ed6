"""Pay or revert: what is measured to be faster stays, what is not is taken back, and a recipe remembers which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
import torch
import torch.fx as fx
from torch import nn

import fxopt
from fxopt import Inputs, bench, prove, record, registry, report, spec
from fxopt.artifact import save
from fxopt.bench import Comparison, Verdict
from fxopt.capture import capture
from fxopt.contract import Change, Pass, Promise, Rewrite, Skip
from fxopt.engines import Executable
from fxopt.errors import SpecError, VerifyError
from fxopt.graph import GraphModule, Region
from fxopt.ledger import LedgerEntry
from fxopt.pipeline import run_passes
from fxopt.prove import Prover
from fxopt.rewriting import run_pass
from fxopt.verify import Oracle
from passes import Fuse
from tests.report.record_example import comparison

INPUTS = Inputs((torch.linspace(-1, 1, 8).reshape(2, 4),))
IMAGES = Inputs((torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4),))


class Marked(nn.Linear):
    """Computes what a linear layer does; tests give it a price."""


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).eval()


@dataclass(frozen=True)
class Mark(Rewrite[fx.Node]):
    name: ClassVar[str] = "mark"
    promise: ClassVar[Promise] = Promise.EXACT
    for_speed: ClassVar[bool] = True

    def match(self, node: fx.Node, region: Region) -> fx.Node | Skip | None:
        return node if node.op == "call_module" else None

    def rewrite(self, node: fx.Node, region: Region) -> Change:
        old = region.submodule(node)
        marked = Marked(4, 4)
        marked.load_state_dict(old.state_dict())
        region.swap(node, marked)
        return Change("marked", region.qualified(node))


@dataclass(frozen=True)
class MarkAll(Mark):
    """Asks for nobody's leave."""

    name: ClassVar[str] = "mark-all"

    def run(self, region: Region) -> Iterator[Change | Skip]:
        for node in list(region.graph.nodes):
            if self.match(node, region):
                yield self.rewrite(node, region)


@dataclass(frozen=True)
class MarkForGood(Mark):
    """Is there for another reason than speed."""

    name: ClassVar[str] = "mark-for-good"
    for_speed: ClassVar[bool] = False


def priced(prices: Mapping[str, float]) -> prove.Measure:
    """Measures a module as slow as the product of the prices of what is marked in it."""

    def cost(module: nn.Module) -> float:
        return math.prod(prices[name] for name, child in module.named_modules() if isinstance(child, Marked))

    def measure(before: GraphModule, after: GraphModule, seconds: float) -> Comparison:
        return found(cost(after) / cost(before))

    return measure


def found(ratio: float) -> Comparison:
    if abs(ratio - 1) <= 0.02:
        return comparison(Verdict.EQUIVALENT, ratio)
    return comparison(Verdict.FASTER if ratio < 1 else Verdict.SLOWER, ratio)


def proven(
    each: Pass, measure: prove.Measure, level: str, module: nn.Module, inputs: Inputs = INPUTS, **options: Any
) -> tuple[LedgerEntry, GraphModule]:
    captured = capture(module, inputs.args)
    ledger = run_passes(captured, [each], Oracle(module, inputs), revisions=[Prover(measure, level, **options)])
    return ledger.entries[0], captured.module


def marked(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, Marked)]


WHOLE = {
    "faster": (0.8, True, ""),
    "as fast": (1.0, False, "the module is as fast without it"),
    "slower": (1.2, False, "the module is slower with it"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_pass_stays_only_if_the_module_is_faster_with_it(name: str) -> None:
    ratio, kept, reason = WHOLE[name]
    module = layers()
    entry, result = proven(Mark(), priced({"0": ratio, "1": 1.0, "2": 1.0}), "pass", module)
    (proof,) = entry.proofs
    assert (proof.where, proof.kept, proof.reason) == ("", kept, reason)
    assert proof.latency is not None
    assert proof.latency.ratio == pytest.approx(ratio)
    assert [change.where for change in proof.changes] == ["0", "1", "2"]
    assert marked(result) == (["0", "1", "2"] if kept else [])
    assert entry.changes == (proof.changes if kept else ())
    assert entry.is_reverted is not kept
    with torch.no_grad():
        assert torch.equal(result(*INPUTS.args), module(*INPUTS.args))


def test_a_gain_that_noise_hides_is_none_and_says_what_would_help() -> None:
    noisy = comparison(Verdict.INCONCLUSIVE, 0.9, notes=("more pairs would help",))
    entry, result = proven(Mark(), lambda *_: noisy, "pass", layers())
    assert entry.proofs[0].reason == "no gain could be shown: more pairs would help"
    assert not marked(result)


SINGLE: dict[str, tuple[dict[str, float], list[str], list[str]]] = {
    "what costs goes, of a pass that pays": (
        {"0": 0.7, "1": 1.2, "2": 1.0},
        ["0", "2"],
        ["", "the module is faster without it", "too small to tell; it goes with the pass"],
    ),
    "what pays stays, of a pass that does not": (
        {"0": 0.8, "1": 1.3, "2": 1.0},
        ["0"],
        ["", "the module is faster without it", "too small to tell; it goes with the pass"],
    ),
    "small gains that count together stay": (
        {"0": 0.99, "1": 0.99, "2": 0.99},
        ["0", "1", "2"],
        ["too small to tell; it goes with the pass"] * 3,
    ),
    "small costs go": ({"0": 1.01, "1": 1.01, "2": 1.01}, [], ["too small to tell; it goes with the pass"] * 3),
    "nothing that pays": ({"0": 1.1, "1": 1.1, "2": 1.1}, [], ["the module is faster without it"] * 3),
}


@pytest.mark.parametrize("name", SINGLE)
def test_each_place_is_held_against_the_module_without_it(name: str) -> None:
    prices, kept, reasons = SINGLE[name]
    entry, result = proven(Mark(), priced(prices), "match", layers())
    whole, *singles = entry.proofs
    assert [proof.where for proof in singles] == ["0", "1", "2"]
    assert [proof.reason for proof in singles] == reasons
    assert marked(result) == kept
    assert [proof.where for proof in singles if proof.kept] == kept
    assert [change.where for change in entry.changes] == kept
    assert entry.is_reverted is (not kept)
    assert entry.spared == (frozenset("012") - set(kept) if kept else frozenset())
    assert whole.latency is not None
    assert whole.latency.ratio == pytest.approx(math.prod(prices[name] for name in kept or prices))


def test_what_rests_on_a_change_goes_with_it() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def measure(before: GraphModule, after: GraphModule, seconds: float) -> Comparison:
        def cost(module: nn.Module) -> float:  # folding the first batch norm costs, the other pays
            kept = {name for name, child in module.named_modules() if isinstance(child, nn.BatchNorm2d)}
            return (1.0 if "0.1" in kept else 1.5) * (1.0 if "1.1" in kept else 0.4)

        return found(cost(after) / cost(before))

    module = nn.Sequential(block(), block()).eval()
    entry, result = proven(Fuse(), measure, "match", module, IMAGES)
    reasons = {proof.where: proof.reason for proof in entry.proofs if not proof.kept}
    assert reasons == {"0.1": "the module is faster without it", "0.2": "it rested on what was reverted"}
    assert entry.spared == {"0.1"}
    assert [name for name, child in result.named_modules() if isinstance(child, nn.BatchNorm2d)] == ["0.1"]


def test_a_pass_that_leaves_nothing_out_is_judged_as_a_whole() -> None:
    entry, result = proven(MarkAll(), priced({"0": 0.5, "1": 1.1, "2": 1.0}), "match", layers())
    assert entry.proofs[0].kept
    assert {proof.reason for proof in entry.proofs[1:]} == {
        "not measured: it cannot be left out alone; it goes with the pass"
    }
    assert marked(result) == ["0", "1", "2"]


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, ["0", "1", "2"]), (1.5, [])])
def test_what_the_budget_leaves_out_goes_with_the_pass(ratio: float, kept: list[str]) -> None:
    measure = priced({"0": ratio, "1": 1.0, "2": 1.0})
    entry, result = proven(Mark(), measure, "match", layers(), budget_seconds=0.01)
    assert {proof.reason for proof in entry.proofs[1:]} == {
        "not measured: the budget of 0.01 s was spent; it goes with the pass"
    }
    assert marked(result) == kept


def test_a_pass_for_something_else_is_kept_and_not_measured() -> None:
    entry, result = proven(MarkForGood(), lambda *_: pytest.fail("it measured"), "pass", layers())
    assert entry.proofs == ()
    assert marked(result) == ["0", "1", "2"]


def test_a_pass_that_changes_nothing_is_not_measured() -> None:
    entry, _ = proven(Fuse(), lambda *_: pytest.fail("it measured"), "pass", layers())
    assert entry.proofs == ()


def test_what_is_left_is_verified_again() -> None:
    @dataclass(frozen=True)
    class Hasty(Mark):
        """Computes something else once it may not change everything."""

        def rewrite(self, node: fx.Node, region: Region) -> Change:
            change = super().rewrite(node, region)
            if region.program.spared:
                region.submodule(node).weight.data.zero_()  # type: ignore[operator, union-attr]
            return change

    with pytest.raises(VerifyError, match=r"mark: the output differs .* after: marked '0'"):
        proven(Hasty(), priced({"0": 0.5, "1": 1.2, "2": 1.0}), "match", layers())


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sides that were compared: folding '0.1' costs, all else pays."""
    sides: list[Any] = []

    def compare(before: Callable[..., Any], after: Callable[..., Any], *_: Any, **__: Any) -> Comparison:
        sides.append((before, after))
        cost = [1.0, 1.0]
        for index, side in enumerate((before, after)):
            module = getattr(side, "__self__", side)
            norms = [name for name, child in module.named_modules() if isinstance(child, nn.BatchNorm2d)]
            cost[index] = 0.9 ** -len(norms) * (0.5 if any(name.endswith("0.1") for name in norms) else 1.0)
        return found(cost[1] / cost[0])

    monkeypatch.setattr(bench, "compare", compare)
    return sides


def model() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    return nn.Sequential(block(), block(), block()).eval()


def test_the_recipe_makes_again_what_was_kept(tmp_path: Path, compared: list[Any]) -> None:
    original = model()
    result = fxopt.optimize(original, IMAGES, "clean,fuse", prove="match", devices=())
    assert [change.where for change in result.ledger.changes] == ["1.1", "2.1"]
    save(result, tmp_path / "out")
    loaded = fxopt.load(tmp_path / "out", original)
    assert list(loaded.state_dict()) == list(result.module.state_dict())
    assert "0.1.running_mean" in loaded.state_dict()
    with torch.no_grad():
        assert torch.equal(loaded(*IMAGES.args), result.module(*IMAGES.args))


def test_the_recipe_leaves_out_what_was_reverted(tmp_path: Path, compared: list[Any]) -> None:
    original = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    original = nn.Sequential(original).eval()
    result = fxopt.optimize(original, IMAGES, "clean,fuse", prove="pass", devices=())
    assert result.ledger.entries[1].is_reverted
    save(result, tmp_path / "out")
    assert '"spec": "clean"' in (tmp_path / "out" / "recipe.json").read_text()
    with torch.no_grad():
        assert torch.equal(fxopt.load(tmp_path / "out", original)(*IMAGES.args), result.module(*IMAGES.args))


def test_the_report_tells_what_was_reverted_and_why(compared: list[Any]) -> None:
    result = fxopt.optimize(model(), IMAGES, "clean,fuse", prove="match", devices=())
    jsonschema.validate(result.record, record.schema())
    for style in ("table", "markdown"):
        text = " ".join(report.render(result.record, style).replace("|", " ").replace("\\", "").split())
        assert "fuse 0.1 1.80x slower [1.76, 1.84] 0.8 % reverted" in text
        assert "fuse (the whole pass) 1.23x faster [1.21, 1.26] 0.8 % kept" in text
        assert "fuse: reverted, the module is faster without it: 0.1" in text


def test_the_engine_that_is_asked_for_runs_both_sides(compared: list[Any]) -> None:
    fxopt.optimize(model(), IMAGES, "fuse", prove="pass", devices=(), engine="onednn", engine_seconds=0.1)
    assert all(isinstance(getattr(side, "__self__", None), Executable) for side in compared[0])
    compared.clear()
    fxopt.optimize(model(), IMAGES, "fuse", prove="pass", devices=())
    assert all(isinstance(side, GraphModule) for side in compared[0])


def test_passes_are_really_measured() -> None:
    result = fxopt.optimize(model(), IMAGES, "clean,fuse", prove="match", prove_seconds=3.0, devices=())
    whole, *singles = result.ledger.entries[1].proofs
    assert whole.latency is not None
    assert whole.latency.pairs > 0
    assert [proof.where for proof in singles] == ["0.1", "1.1", "2.1"]


def test_another_level_is_refused() -> None:
    with pytest.raises(SpecError, match="expected 'pass' to measure each pass, or 'match' each change, not 'each'"):
        fxopt.optimize(model(), IMAGES, "fuse", prove="each")


class Attending(nn.Module):
    """Attention by hand, with a norm, and three layers on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(self.q(x) @ self.k(x).transpose(-2, -1) / 2.0, -1) @ self.v(x)
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return y * torch.sigmoid(y)


class Stages(nn.Module):
    """A layer with a batch norm, and one with an addition and an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.two(self.norm(self.one(x)).relu()) + x).relu()


class Padded(nn.Module):
    """A pad before a layer, and a scale behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x, (1, 1, 1, 1))) * 2.0


SEQUENCE = Inputs((torch.linspace(-1, 1, 24).reshape(1, 6, 4),))
SPARING: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "attention": (Attending, SEQUENCE),
    "cast": (Stages, IMAGES),
    "fuse": (Stages, IMAGES),
    "layout": (Padded, IMAGES),
    "merge": (Attending, SEQUENCE),
}


@pytest.mark.parametrize("name", [name for name, kind in registry.available().items() if kind.for_speed])
def test_every_pass_for_speed_leaves_out_single_places(name: str) -> None:
    factory, inputs = SPARING[name]
    (each,) = spec.parse(name)
    module = factory().eval()

    def places(spared: frozenset[str] = frozenset()) -> list[str]:
        captured = capture(module, inputs.args)
        return [change.where for change in run_pass(each, captured.module, (), spared=spared)[0]]

    assert places()
    for place in places():
        assert place not in places(frozenset({place}))
