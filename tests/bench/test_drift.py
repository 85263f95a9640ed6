"""Equal work that takes longer as time goes on."""

from __future__ import annotations

import pytest

from fxopt.bench.drift import drift_notes


@pytest.mark.parametrize(
    ("times", "said"),
    [
        pytest.param([1.0] * 30 + [1.3] * 10, "the medians of four parts of the run differ by 30 %", id="slower"),
        pytest.param([1.3] * 10 + [1.0] * 30, "the medians of four parts of the run differ by 30 %", id="faster"),
        pytest.param([1.0, 1.3] * 20, "", id="as restless in all parts"),
        pytest.param([1.0] * 30 + [1.1] * 10, "", id="hardly slower"),
        pytest.param([1.0] * 39 + [9.0], "", id="one that is late"),
        pytest.param([1.0] * 10 + [2.0] * 10, "", id="too few to tell"),
        pytest.param([], "", id="none"),
    ],
)
def test_a_machine_that_changes_its_speed_is_told(times: list[float], said: str) -> None:
    assert [said in note for note in drift_notes(times)] == [True] * bool(said)
