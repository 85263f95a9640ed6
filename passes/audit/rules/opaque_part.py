"""FX507: a part that no graph can hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fxopt.findings import Place, Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.decisions import in_decision
from passes.audit.evidence.places import line_of
from passes.audit.rule import Found, rule


@rule("FX507", Severity.NOTE)
def opaque_part(evidence: Evidence) -> Iterator[Found]:
    """A part that no graph can hold.

    What its Python code does depends on the values of the input, or changes things outside of the tensors: export
    fails there, and a compiler falls back to Python.

    Bad:
        return x * float(x.abs().max())

    Good:
        return x * x.abs().max()

    Fix: keep values in tensors, or keep the part out of what is exported.
    """
    for part in evidence.graph.opaque:
        place = _found(evidence, part.place) if part.place is not None else None
        # A decision on a value has a rule of its own.
        if place is None or not in_decision(place):
            yield Found(f"'{part.module or 'the model'}' stays Python code: {part.what}", place, part.module)


def _found(evidence: Evidence, near: Place) -> Place | None:
    """The place whose file is known by name alone."""
    exact = [step.place for step in evidence.forward.steps if step.place is not None and step.place.line == near.line]
    same = [place for place in exact if Path(place.path).name == near.path]
    if same:
        return same[0]
    files = {body.path for body in evidence.bodies if Path(body.path).name == near.path}
    return line_of(files.pop(), near.line) if len(files) == 1 else None
