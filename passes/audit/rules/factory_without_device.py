"""FX202: a tensor made in the forward without a device."""

from __future__ import annotations

import ast
import dataclasses
import linecache
from collections.abc import Iterator

from fxopt.findings import Finding, Fix, Place, Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule

_MOVES = ("_to_copy", "clone")
_FACTORIES = {"zeros", "ones", "full", "arange", "empty", "eye", "linspace", "rand", "randn", "tensor"}


def _fix(evidence: Evidence, place: Place) -> Fix | None:
    for body in evidence.bodies:
        arguments = [item.arg for item in body.node.args.args[1:]]
        for call in body.calls() if body.path == place.path and arguments else ():
            name = ast.unparse(call.func)
            if not call.lineno == call.end_lineno == place.line or not name.startswith("torch."):
                continue
            if name.removeprefix("torch.") in _FACTORIES and call.end_col_offset:
                line = linecache.getline(place.path, place.line).rstrip()
                end = len(line.encode()[: call.end_col_offset].decode()) - 1
                given = line[:end].rstrip(" ,")
                text = f"{given}, device={arguments[0]}.device{line[end:]}"
                return Fix(place.path, place.line, place.line, text, "make it on the device of the input")
    return None


class FactoryWithoutDevice(Rule):
    """A tensor made in the forward without a device.

    It is made on the CPU and meets tensors of the GPU, which fails there, and only there.

    Bad:
        mask = torch.ones(x.shape[1])

    Good:
        mask = torch.ones(x.shape[1], device=x.device)

    Fix: pass `device=`.
    """

    id = "FX202"
    name = "factory-without-device"
    group = "device"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        for meeting in evidence.meetings:
            made = meeting.made
            if made is None or meeting.maker in _MOVES or (made.path, made.line) in reported:
                continue
            reported.add((made.path, made.line))
            related = (dataclasses.replace(meeting.place, note="it meets the GPU here"),) if meeting.place else ()
            message = (
                f"this tensor of shape {meeting.shape} is made on the CPU, and '{meeting.operator}' needs it elsewhere"
            )
            place = dataclasses.replace(made, note="")
            yield self.found(message, place, meeting.module, related, fix=_fix(evidence, place))
