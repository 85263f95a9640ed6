from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.bench import Roofline, measure_latency, measure_roofline, measure_throughput, profile
from fxopt.bench.cold import ColdStart
from fxopt.bench.latency import percentile
from fxopt.bench.operators import operators_of
from fxopt.bench.surroundings import pinned
from fxopt.bench.survey import survey
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.target import Target

TABLE = torch.randn(1000, 5)
CEILINGS = Roofline(1e9, 1e9, "float32")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


X = torch.randn(2, 3, 8, 8)


def test_each_operator_has_its_time_flops_and_bytes() -> None:
    found = profile(Net().eval(), X, roofline=CEILINGS, threads=1)
    costs = {cost.name: cost for cost in found.operators}
    assert costs["aten::convolution"].flops == 2 * (2 * 4 * 8 * 8) * (3 * 3 * 3)
    assert costs["aten::addmm"].flops == 2 * 2 * 256 * 10
    assert costs["aten::addmm"].bytes == 4 * (2 * 256 + 256 * 10 + 10 + 2 * 10)
    assert costs["aten::view"].bytes == 0 and costs["aten::view"].roofline is None
    assert costs["aten::relu"].flops is None
    for cost in (costs["aten::convolution"], costs["aten::relu"]):
        least = max((cost.flops or 0) / 1e9, (cost.bytes or 0) / 1e9)
        assert cost.roofline == pytest.approx(least / cost.seconds)
    assert sum(cost.seconds for cost in found.operators) + found.python == pytest.approx(found.seconds)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        pytest.param(
            lambda x: x.t().reshape(2, 3, 4) @ torch.ones(4, 5), 2 * 6 * 4 * 5, id="reshape of a transposition"
        ),
        pytest.param(
            lambda x: F.linear(x.unflatten(1, (3, 2)).transpose(1, 2), torch.ones(5, 3), torch.ones(5)),
            2 * 8 * 3 * 5,
            id="bias behind a product",
        ),
        pytest.param(lambda x: (x + 1).add_(1) @ x.t(), 2 * 4 * 6 * 4, id="addition in place"),
    ],
)
def test_operators_that_go_by_another_name_while_they_are_watched_have_flops(
    function: Callable[[torch.Tensor], torch.Tensor], flops: int
) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    found = profile(Calls(), torch.randn(4, 6), roofline=CEILINGS, threads=1)
    assert found.notes == ()
    assert sum(cost.flops or 0 for cost in found.operators) == flops


@pytest.mark.parametrize(
    ("function", "name", "bytes"),
    [
        pytest.param(lambda x: F.embedding(x, TABLE), "embedding", 8 * 6 + 2 * 4 * 6 * 5, id="embedding"),
        pytest.param(lambda x: TABLE[x], "index", 8 * 6 + 2 * 4 * 6 * 5, id="index"),
        pytest.param(lambda x: TABLE.gather(0, x.view(2, 3)), "gather", 8 * 6 + 2 * 4 * 6, id="gather"),
        pytest.param(lambda x: TABLE[:2].index_select(0, x), "index_select", 8 * 6 + 4 * (2 + 6) * 5, id="small table"),
    ],
)
def test_of_a_table_only_what_is_looked_up_is_read(
    function: Callable[[torch.Tensor], torch.Tensor], name: str, bytes: int
) -> None:
    found = operators_of(lambda: function(torch.tensor([0, 1, 1, 0, 1, 0])))
    assert [operator.bytes for operator in found if operator.name == f"aten::{name}"] == [bytes]


def test_each_module_has_what_is_in_it_but_not_in_its_submodules() -> None:
    found = profile(Net().eval(), X, roofline=CEILINGS, threads=1)
    modules = {cost.name: cost for cost in found.modules}
    assert set(modules) == {"", "conv", "norm", "head", "head.0", "head.1"}
    assert modules["conv"].kind == "Conv2d" and modules["head.1"].flops == 2 * 2 * 256 * 10
    assert modules["head"].flops is None
    assert modules[""].bytes == 2 * 4 * X.shape[0] * 4 * 8 * 8  # relu reads and writes
    assert sum(cost.share for cost in found.modules) == pytest.approx(1, abs=0.2)


def test_memory_of_the_allocator_holds_what_tensors_need() -> None:
    assert profile(Net().eval(), X, roofline=CEILINGS).allocated >= 2 * 4 * X.shape[0] * 4 * 8 * 8


def test_an_encoder_layer_is_not_one_operator_that_shows_nothing() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    found = profile(layer, torch.randn(1, 4, 16), roofline=CEILINGS)
    assert found.notes == () and {"linear1", "self_attn"} <= {cost.name for cost in found.modules}


def test_operators_that_differ_between_two_looks_have_times_only() -> None:
    class Restless(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Restless.calls += 1
            return x.exp() if Restless.calls == 2 else x.log()

    found = profile(Restless(), X, roofline=CEILINGS)
    assert [cost.bytes for cost in found.operators] == [None]
    assert "are not those" in found.notes[0]


def test_the_profiler_tells_nothing_on_the_terminal() -> None:
    code = (
        "import torch; from fxopt.bench import Roofline, profile; "
        "profile(torch.nn.Linear(2, 2).eval(), torch.ones(1, 2), roofline=Roofline(1e9, 1e9, 'float32'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_profiled_module_keeps_no_hooks() -> None:
    class Single(Net):
        def __deepcopy__(self, memo: object) -> Single:
            raise TypeError("there is only one")

    net = Single().eval()
    profile(net, X, roofline=CEILINGS)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in net.modules())


def test_in_place_operators_move_bytes_and_views_do_not() -> None:
    x = torch.ones(4)
    found = {one.name: one.bytes for one in operators_of(lambda: x.view(2, 2).mul_(2))}
    assert found == {"aten::view": 0, "aten::mul_": 32}


def test_ceilings_are_measured() -> None:
    found = measure_roofline(torch.device("cpu"), torch.float32, threads=1)
    assert 1e8 < found.flops_per_second < 1e14 and 1e8 < found.bytes_per_second < 1e13
    assert found.shortest(2 * found.flops_per_second, found.bytes_per_second) == pytest.approx(2)


@pytest.mark.parametrize(
    ("calls", "part", "fewest", "expected"),
    [(63, 0.9, 64, None), (64, 0.9, 64, 58e3), (661, 0.99, 662, None), (662, 0.99, 662, 656e3)],
)
def test_percentiles_need_enough_calls(calls: int, part: float, fewest: int, expected: float | None) -> None:
    assert percentile([float(second) for second in range(1, calls + 1)], part, fewest) == expected


def test_latency_holds_every_call_and_restores_the_surroundings() -> None:
    threads = torch.get_num_threads()
    found = measure_latency(Net().eval(), X, budget_seconds=0.2, threads=1)
    assert found.low_ms <= found.median_ms <= found.high_ms
    assert found.threads == 1 and torch.get_num_threads() == threads
    assert (found.percentiles["p90"] is None) == (len(found.times) < 64)


def test_throughput_by_batch_or_why_not() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 3, 8, 8)

    found = measure_throughput(Stubborn(), X, batches=(2, 3), budget_seconds=0.1)
    assert not isinstance(found[2], str) and found[2].per_second > 0
    assert "invalid for input of size" in str(found[3])
    assert measure_throughput(Stubborn(), torch.tensor(1.0), batches=(1,))[1] == (
        "the inputs have no common batch in dimension 0"
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot hold threads to cores")
def test_threads_are_held_to_cores_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    torch.randn(256, 256) @ torch.randn(256, 256)  # threads of torch are there now
    tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    had = {task: os.sched_getaffinity(task) for task in tasks}
    with pinned([core]):
        assert all(os.sched_getaffinity(task) == {core} for task in tasks)
    assert {task: os.sched_getaffinity(task) for task in tasks} == had
    with pytest.raises(EngineError, match="this process may run on"), pinned([4096]):
        pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot hold threads to cores")
def test_all_of_a_survey_is_held_to_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    core = max(os.sched_getaffinity(0))
    ran_on: list[set[int]] = []

    class Tells(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran_on.append(os.sched_getaffinity(0))
            return x + 1

    def on_cores(*_: object) -> Roofline:
        ran_on.append(os.sched_getaffinity(0))
        return CEILINGS

    def cold() -> ColdStart:
        ran_on.append(os.sched_getaffinity(0))
        return ColdStart(0.0, 0.0, 0.0, 0.0, None, None)

    monkeypatch.setattr("fxopt.bench.survey.measure_roofline", on_cores)
    target = Target("tells", Tells(), Inputs.of(torch.ones(2, 3)))
    found = survey(target, batches=(1,), budget_seconds=0.05, cores=[core], cold=cold)
    assert set(map(frozenset, ran_on)) == {frozenset({core})}
    assert found.machine.cores == len(os.sched_getaffinity(0))


def test_the_ceiling_of_floats_of_8_bits_is_that_of_what_they_are_widened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.float()

    asked: list[torch.dtype] = []

    def ceilings(device: torch.device, dtype: torch.dtype, threads: int | None) -> Roofline:
        asked.append(dtype)
        return Roofline(1.0, 1.0, "")

    monkeypatch.setattr("fxopt.bench.survey.measure_roofline", ceilings)
    survey(Target("narrow", Narrow(), Inputs.of(torch.ones(2, 3))), batches=(1,), budget_seconds=0.05)
    assert asked == [torch.float32]
