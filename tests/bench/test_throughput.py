"""Throughput by batch size: what is left out where a call takes long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.bench import Latency, measure_throughput, throughput
from fxopt.inputs import Inputs


@pytest.mark.parametrize(
    ("seconds_a_sample", "batches", "measured"),
    [
        (0.01, (1, 8, 32), [1, 8, 32]),
        (0.2, (1, 8, 32), [1, 8]),
        (2.0, (1, 2, 4), [1]),
        (2.0, (32,), [32]),
        (2.0, (32, 1), [32, 1]),
    ],
)
def test_batches_whose_calls_would_take_far_more_than_the_budget_are_left_out(
    seconds_a_sample: float, batches: tuple[int, ...], measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(module: object, inputs: Inputs, device: object, **options: Any) -> Latency:
        milliseconds = 1e3 * seconds_a_sample * len(inputs.tensors[0])
        return Latency("cpu", 1, milliseconds, milliseconds, milliseconds, {}, (milliseconds / 1e3,), 0.0, None)

    monkeypatch.setattr(throughput, "measure_latency", instead)
    found = measure_throughput(torch.sin, torch.ones(1, 3), batches=batches, budget_seconds=5.0)
    assert [batch for batch, one in found.items() if not isinstance(one, str)] == measured
    assert list(found) == list(batches)
    for batch in set(batches) - set(measured):
        seconds = 7 * batch * seconds_a_sample
        assert found[batch] == (
            f"7 calls would take about {seconds:.0f} s: raise the budget, or ask for this size alone"
        )
