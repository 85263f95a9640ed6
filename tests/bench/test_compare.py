from __future__ import annotations

import copy
import dataclasses
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.bench import Comparison, Sample, Verdict, compare, compare_all
from fxopt.errors import EngineError, LoadError


class Clock:
    """Time that passes only where a module says so; copies of the module share it."""

    limits = ()

    def __init__(self, preempted: bool | None = False) -> None:
        self.seconds = 0.0
        self.preempted = preempted
        self.order: list[str] = []
        self.last: nn.Module | None = None

    def __deepcopy__(self, memo: object) -> Clock:
        return self

    def now(self) -> float:
        return self.seconds

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        start = self.seconds
        for _ in range(calls):
            call()
        return Sample((self.seconds - start) / calls, self.preempted)


class Takes(nn.Module):
    """A module that takes so many seconds a call, give or take the noise."""

    def __init__(self, clock: Clock, seconds: float, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.clock, self.seconds, self.noise = clock, seconds, noise
        self.rng = np.random.default_rng(seed)

    def __deepcopy__(self, memo: object) -> Takes:
        return Takes(self.clock, self.seconds, self.noise, int(self.rng.integers(2**31)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += self.seconds * float(np.exp(self.noise * self.rng.standard_normal()))
        self.clock.order.append("before" if self.seconds == 0.01 else "after")
        return x


def fake(
    seconds: float, *, noise: float = 0.0, seed: int = 0, preempted: bool | None = False, **how: Any
) -> Comparison:
    clock = Clock(preempted)
    before, after = Takes(clock, 0.01, noise, 2 * seed), Takes(clock, seconds, noise, 2 * seed + 1)
    return compare(before, after, torch.zeros(1), timer=clock, **how)


@pytest.mark.parametrize(
    ("seconds", "noise", "verdict"),
    [
        (0.0080001, 0.01, Verdict.FASTER),
        (0.0125, 0.01, Verdict.SLOWER),
        (0.0100001, 0.01, Verdict.EQUIVALENT),
        (0.0097, 0.5, Verdict.INCONCLUSIVE),
        (0.0100001, 0.5, Verdict.INCONCLUSIVE),
        (0.005, 0.3, Verdict.FASTER),
    ],
)
def test_verdicts(seconds: float, noise: float, verdict: Verdict) -> None:
    found = fake(seconds, noise=noise)
    assert found.verdict is verdict
    assert found.low <= seconds / 0.01 <= found.high
    assert found.after_ms == pytest.approx(1e3 * seconds, rel=noise)


def test_equal_modules_are_never_told_apart() -> None:
    told = [fake(0.0100001, noise=0.2, seed=seed, budget_seconds=2).verdict for seed in range(25)]
    assert not {Verdict.FASTER, Verdict.SLOWER} & set(told)


def test_noise_floor_is_that_of_equal_modules() -> None:
    assert fake(0.005).noise_floor == 0
    assert fake(0.005, noise=0.3).noise_floor > fake(0.005, noise=0.03).noise_floor > 0


def test_preemption_is_told() -> None:
    assert fake(0.0100001, noise=0.5, preempted=True).preempted == 1
    assert any("preempted" in note for note in fake(0.0100001, noise=0.5, preempted=True).notes)
    assert fake(0.005, preempted=None).preempted is None


def test_a_clock_that_falls_is_told() -> None:
    class Tires(Takes):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.clock.seconds += self.seconds * self.clock.seconds / 2
            return super().forward(x)

        def __deepcopy__(self, memo: object) -> Tires:
            return Tires(self.clock, self.seconds)

    clock = Clock()
    found = compare(Tires(clock, 0.01), Tires(clock, 0.005), torch.zeros(1), timer=clock, budget_seconds=8)
    assert found.verdict is Verdict.FASTER
    assert any("the machine's speed changed meanwhile" in note for note in found.notes)
    assert not fake(0.005).notes


@pytest.mark.parametrize(
    ("how", "least", "most"),
    [
        pytest.param({"pairs": 7}, 7, 7, id="so many as asked for"),
        pytest.param({"pairs": 50, "budget_seconds": 0.001}, 50, 50, id="whatever time that takes"),
        pytest.param({}, 30, 30, id="tight at the first look"),
        pytest.param({"noise": 0.5}, 40, 400, id="until the budget is spent"),
        pytest.param({"budget_seconds": 0.1}, 6, 12, id="a slow model gets a handful"),
        pytest.param({"budget_seconds": 0.01}, 1, 2, id="a very slow one gets what is bearable"),
    ],
)
def test_number_of_pairs(how: dict[str, Any], least: int, most: int) -> None:
    found = fake(0.009, **how)
    assert least <= found.pairs <= most
    assert len(found.times.before) == len(found.times.after) == len(found.times.again) == found.pairs
    assert found.pairs >= 6 or found.verdict is Verdict.INCONCLUSIVE


def test_short_calls_are_timed_together() -> None:
    clock = Clock()
    found = compare(Takes(clock, 1e-5), Takes(clock, 2e-5), torch.zeros(1), pairs=6, budget_seconds=0.01, timer=clock)
    assert found.calls in (400, 401)
    assert found.before_ms == pytest.approx(0.01)


def test_a_long_call_beside_a_short_one_is_timed_alone() -> None:
    clock = Clock()
    found = compare(Takes(clock, 1e-5), Takes(clock, 0.5), torch.zeros(1), budget_seconds=10, timer=clock)
    assert (found.before_ms, found.after_ms) == pytest.approx((0.01, 500))
    assert clock.seconds < 20


class SlowAtFirst(Takes):
    """Takes twice as long until it has run for 10 ms since another module did."""

    def __deepcopy__(self, memo: object) -> SlowAtFirst:
        return SlowAtFirst(self.clock, self.seconds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.clock.last is not self:
            self.clock.last, self.began = self, self.clock.seconds
        self.clock.seconds += self.seconds if self.clock.seconds - self.began < 0.01 else 0.0
        return super().forward(x)


@pytest.mark.parametrize(
    ("seconds", "budget", "timed"),
    [
        pytest.param(0.01, 10.0, 0.01, id="a short call is timed as it is when it is repeated"),
        pytest.param(0.001, 10.0, 0.001, id="and so is one that several others have to go before"),
        pytest.param(0.01, 0.1, 0.02, id="but not where the budget is short"),
        pytest.param(0.1, 100.0, 0.2, id="nor where it is long, and caches matter little"),
    ],
)
def test_what_slows_the_first_calls_after_another_module(seconds: float, budget: float, timed: float) -> None:
    clock = Clock()
    module, other = SlowAtFirst(clock, seconds), SlowAtFirst(clock, seconds)
    found = compare(module, other, torch.zeros(1), timer=clock, budget_seconds=budget)
    assert found.after_ms == pytest.approx(1e3 * timed)


def test_order_is_drawn_and_then_reversed() -> None:
    clock = Clock()
    compare(Takes(clock, 0.01), Takes(clock, 0.02), torch.zeros(1), pairs=40, budget_seconds=0.1, timer=clock)
    rounds = [tuple(clock.order[start : start + 3]) for start in range(len(clock.order) - 3 * 40, len(clock.order), 3)]
    assert all(first == second[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds[::2])) == 3


def test_same_seed_same_result() -> None:
    assert fake(0.009, noise=0.1, seed=3) == fake(0.009, noise=0.1, seed=3)


def test_progress_grows_to_one() -> None:
    told: list[float] = []
    fake(0.009, noise=0.3, progress=told.append)
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] == 1


def test_result_is_frozen_and_reads_well() -> None:
    found = fake(0.005)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.ratio = 1.0  # type: ignore[misc]
    assert found.speedup == pytest.approx(2)
    assert repr(found) == "faster on cpu: 10 -> 5 ms, speed-up 2.00 [2.00, 2.00], noise floor 0.0 %, 30 pairs"


class Restless(nn.Module):
    """Draws random numbers of every kind, in training mode keeps statistics, and notes how it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.seen: list[tuple[bool, bool, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        random.random()
        np.random.random()
        self.seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return torch.dropout(self.norm(x), 0.5, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Restless:
        twin = Restless()
        twin.norm = copy.deepcopy(self.norm, memo)
        twin.train(self.training)
        twin.seen = self.seen
        return twin


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_user_is_touched(training: bool) -> None:
    module = Restless().train(training)
    state = copy.deepcopy(module.state_dict())
    x = torch.randn(8, 4)
    kept, threads = x.clone(), torch.get_num_threads()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    compare(module, nn.Identity(), x, pairs=3, budget_seconds=0.05, threads=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[union-attr]
    assert module.training is training and torch.is_grad_enabled() and gc.isenabled()
    assert torch.get_num_threads() == threads
    assert torch.equal(x, kept)
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert set(module.seen) == {(training, False, 1)}


def test_surroundings_come_back_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(EngineError):
        compare(nn.Linear(3, 3), nn.Linear(4, 4), torch.zeros(1, 3), threads=1)
    assert (torch.get_num_threads(), gc.isenabled(), torch.is_grad_enabled()) == (threads, True, True)


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.largest: list[float] = []

    def __deepcopy__(self, memo: object) -> Doubles:
        twin = Doubles()
        twin.largest = self.largest
        return twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest.append(float(x.max()))
        return x.mul_(2)


def test_written_inputs_are_put_back_before_each_call() -> None:
    module = Doubles()
    x = torch.ones(4)
    found = compare(module, nn.Identity(), x, pairs=5, budget_seconds=0.05)
    assert set(module.largest) == {1.0} and found.calls == 1
    assert torch.equal(x, torch.ones(4))


def test_inputs_of_every_kind() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x * scale

    x, scale = torch.ones(2), torch.ones(2)
    for inputs in ((x, scale), {"x": x, "scale": scale}):
        assert compare(Two(), Two(), inputs, pairs=2, budget_seconds=0.01).pairs == 2
    with pytest.raises(LoadError, match="expected a tensor"):
        compare(Two(), Two(), 3)


def test_first_call_and_peak_memory_of_each() -> None:
    class Lazy(Takes):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not hasattr(self, "built"):
                self.built = True
                self.clock.seconds += 2.0
            return torch.cat([super().forward(x)] * 4)

    clock = Clock()

    class Copied(Lazy):
        def __deepcopy__(self, memo: object) -> Copied:
            return Copied(self.clock, self.seconds)

    found = compare(Takes(clock, 0.01), Copied(clock, 0.005), torch.zeros(256), pairs=2, timer=clock)
    assert (found.first_call.before, found.first_call.after) == pytest.approx((0.01, 2.005))
    assert (found.peak_memory.before, found.peak_memory.after) == (0, 4096)


def test_what_cannot_be_copied_runs_itself() -> None:
    class Single(nn.Module):
        def __deepcopy__(self, memo: object) -> Single:
            raise TypeError("there is only one")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    found = compare(Single(), torch.relu, torch.zeros(1), pairs=2, budget_seconds=0.01)
    assert found.notes[-2:] == (
        "'before' (Single) cannot be copied: it ran itself, beside no copy with memory of its own",
        "'after' (builtin_function_or_method) cannot be copied: it ran itself, beside no copy with memory of its own",
    )
    assert found.peak_memory.after is None


class Breaks(nn.Module):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of calls")
        return x


@pytest.mark.parametrize("calls", [0, 3, 8])
def test_a_module_that_raises(calls: int) -> None:
    with pytest.raises(EngineError) as caught:
        compare(nn.Identity(), Breaks(calls), torch.zeros(2, 3), pairs=20)
    assert str(caught.value) == (
        "'after' (Breaks) raised RuntimeError while measured on 'cpu' with inputs 2x3 float32: out of calls"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        pytest.param(
            "cuda",
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this one is for machines without CUDA"),
        ),
        ("mps", "fxopt measures on 'cpu' and 'cuda', not on 'mps'"),
        ("gpu", "'gpu' names no device"),
    ],
)
def test_a_device_that_is_not_there(device: str, reason: str) -> None:
    with pytest.raises(EngineError) as caught:
        compare(nn.Identity(), nn.Identity(), torch.zeros(1), device)
    assert str(caught.value) == f"cannot measure on {device!r}: {reason}; device='cpu' always works"


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"budget_seconds": 0}, {"margin": -0.1}])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        compare(nn.Identity(), nn.Identity(), torch.zeros(1), **wrong)


def test_several_are_compared_in_the_same_rounds() -> None:
    clock = Clock()
    found = compare_all(
        Takes(clock, 0.01, 0.01),
        {
            "slow": Takes(clock, 0.02, 0.01, 1),
            "fast": Takes(clock, 0.005, 0.01, 2),
            "same": Takes(clock, 0.01, 0.01, 3),
        },
        torch.zeros(1),
        timer=clock,
    )
    assert [one.verdict for one in found.values()] == [Verdict.SLOWER, Verdict.FASTER, Verdict.EQUIVALENT]
    assert len({one.times.before for one in found.values()}) == len({one.pairs for one in found.values()}) == 1
    assert found["same"].times.after != found["same"].times.before


@pytest.mark.parametrize("name", ["before", "again"])
def test_names_that_are_not_free(name: str) -> None:
    with pytest.raises(ValueError, match=f"has another name, got \\['{name}'\\]"):
        compare_all(nn.Identity(), {name: nn.Identity()}, torch.zeros(1))


def test_a_long_call_has_no_lead_and_the_short_one_beside_it_has() -> None:
    clock = Clock()
    found = compare(SlowAtFirst(clock, 0.2), SlowAtFirst(clock, 0.01), torch.zeros(1), timer=clock, budget_seconds=100)
    assert (found.before_ms, found.after_ms) == pytest.approx((400, 10))
