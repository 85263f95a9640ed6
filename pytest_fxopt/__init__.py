"""The gate as a fixture of pytest: `def test_latency(fxopt_gate): fxopt_gate("model.py:Net")`.

It is a package of its own because pytest loads it in every run, and `fxopt` would bring torch along.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fxopt.gate.processes import Launcher


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line say what to compare with."""
    group = parser.getgroup("fxopt")
    group.addoption("--fxopt-base", metavar="REV", help="Revision that `fxopt_gate` compares with.")
    group.addoption("--fxopt-strict", action="store_true", help="Fail `fxopt_gate` where it is inconclusive.")
    parser.addini("fxopt_base", "Revision that `fxopt_gate` compares with.", default="")


class FxoptGate:
    """Holds targets of the working tree against a revision.

    Attributes:
        base: the revision.
    """

    def __init__(self, base: str, strict: bool, launcher: Launcher):
        self.base = base
        self._strict = strict
        self._launcher = launcher

    def __call__(
        self,
        target: str,
        *,
        inputs: Sequence[str] = (),
        passes: str = "",
        fail_over: str | float = 0.05,
        device: str = "cpu",
        threads: int = 1,
        budget: float = 20.0,
        **limits: float,
    ) -> dict[str, Any]:
        """Fail the test at a regression; skip it where the target is new.

        Args:
            target: as `fxopt ci` takes it, relative to the current directory.
            inputs: as `--input` takes them.
            passes: a spec; "" measures the module as it is.
            fail_over: the slow-down that fails, `"5%"` or 0.05.
            device: "cpu" or "cuda".
            threads: that torch runs on the CPU.
            budget: seconds to measure.
            limits: `memory`, `size`, `coverage`, `metrics`, `output_error`, as in `fxopt.toml`.

        Returns:
            The part of the record on this target.
        """
        __tracebackhide__ = True
        from fxopt import gate
        from fxopt.report import render

        for key in limits.keys() - {field.name for field in dataclasses.fields(gate.Limits)}:
            raise TypeError(
                f"fxopt_gate() takes no '{key}': the limits are memory, size, coverage, metrics, output_error"
            )
        shares = {key: gate.limit(key, value, key) for key, value in {"latency": fail_over, **limits}.items()}
        job = gate.Job(
            target,
            target,
            tuple(inputs),
            passes,
            device=device,
            threads=threads,
            budget=budget,
            limits=gate.Limits(**shares),
        )
        record = gate.run_gate(gate.Plan((job,), self.base, Path.cwd()), launcher=self._launcher)
        found: dict[str, Any] = record["targets"][0]
        if found["verdict"] == "new":
            pytest.skip("; ".join(found["notes"]))
        if gate.exit_code(record, self._strict):
            # The first line is all that pytest's summary shows.
            pytest.fail(f"{target}: {found['verdict']}\n\n{render(record)}", pytrace=False)
        return found


@pytest.fixture(scope="session")
def fxopt_gate(pytestconfig: pytest.Config) -> Iterator[FxoptGate]:
    """Holds targets against `--fxopt-base`, the ini file's `fxopt_base`, the base of a pull request, or HEAD."""
    from fxopt.gate.processes import Launcher

    pull_request = os.environ.get("GITHUB_BASE_REF")
    given = pytestconfig.getoption("--fxopt-base") or pytestconfig.getini("fxopt_base")
    base = given or (f"origin/{pull_request}" if pull_request else "HEAD")
    with Launcher() as launcher:
        yield FxoptGate(str(base), bool(pytestconfig.getoption("--fxopt-strict")), launcher)
