"""FX204: a value that goes to the host while the forward runs."""

from __future__ import annotations

import linecache
from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.decisions import in_decision
from passes.audit.evidence.forward import Step
from passes.audit.rule import Found, rule

_TO_HOST = {"item", "cpu", "numpy", "tolist", "__int__", "__float__", "__bool__", "__index__"}


def _names_cpu(step: Step) -> bool:
    """Whether it moves to the CPU wherever it runs: a device in a variable is another one on other machines."""
    texts = [value for value in (*step.args, *step.kwargs.values()) if isinstance(value, str)]
    return "cpu" in texts and step.place is not None and "cpu" in linecache.getline(step.place.path, step.place.line)


@rule("FX204", once_a_line=True)
def host_round_trip(evidence: Evidence) -> Iterator[Found]:
    """A value that goes to the host while the forward runs.

    The GPU has to finish all its work before the host can read; the graph breaks there.

    Bad:
        scale = x.abs().max().item()

    Good:
        scale = x.abs().max()

    Fix: keep the value in a tensor.
    """
    for step in evidence.forward.steps:
        to_host = step.name == "to" and _names_cpu(step)
        if step.place is None or not (to_host or step.name in _TO_HOST) or in_decision(step.place):
            continue
        severity = Severity.WARNING if to_host or step.name in ("cpu", "numpy") else Severity.NOTE
        message = f"'{step.name.strip('_')}' waits for the device, then copies"
        yield Found(message, step.place, step.module, severity=severity)
