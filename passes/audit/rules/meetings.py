"""FX202 and FX203: a tensor on the CPU that meets the model's device, and was made in the forward or not."""

from __future__ import annotations

import ast
import dataclasses
import linecache
from collections.abc import Iterator

from fxopt.findings import Fix, Place, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_MOVES = ("_to_copy", "clone")
_FACTORIES = {"zeros", "ones", "full", "arange", "empty", "eye", "linspace", "rand", "randn", "tensor"}
_FACTORIES |= {"as_tensor"}
_MOVERS = {"to", "cpu", "cuda", "type"}


def _tensor(evidence: Evidence, body: code.Body) -> str:
    """The first argument of a function where it is always a tensor, or ""."""
    first = next(iter(body.arguments), None)
    if first is None or len(body.node.args.defaults) >= len(body.arguments):  # its default is hardly one
        return ""
    if any(name.id == first.arg and isinstance(name.ctx, ast.Store) for name in code.parts(ast.Name, body.node)):
        return ""
    if first.annotation is not None:
        return first.arg if ast.unparse(first.annotation) in ("Tensor", "torch.Tensor") else ""
    if body.node.name != "forward":
        return ""
    return first.arg if {(body.module, 0), (body.module, first.arg)} & evidence.forward.tensors else ""


def _fix(evidence: Evidence, place: Place) -> Fix | None:
    for body in evidence.bodies:
        tensor = _tensor(evidence, body) if body.path == place.path else ""
        for call in body.calls() if tensor else ():
            name = ast.unparse(call.func)
            at = code.at(body.path, call)
            if (at.line, at.column) != (place.line, place.column) or call.end_lineno != place.line:
                continue
            given = {item.arg for item in call.keywords}
            free = name.startswith("torch.") and not given & {"device", None} and not _is_moved(call, body)
            if free and name.removeprefix("torch.") in _FACTORIES and call.end_col_offset:
                close = code.column(place.path, place.line, call.end_col_offset) - 1
                start = len(linecache.getline(place.path, place.line)[: close - 1].rstrip(" ,")) + 1
                text = f", device={tensor}.device"
                return Fix(place.path, place.line, start, place.line, close, text, "make it on the device of the input")
    return None


def _is_moved(call: ast.Call, body: code.Body) -> bool:
    """Whether what it gives is moved in the same expression: then that is what has to change."""
    moves = (each.func for each in body.calls() if isinstance(each.func, ast.Attribute) and each.func.attr in _MOVERS)
    return any(part is call for function in moves for part in ast.walk(function.value))


@rule("FX202", Severity.ERROR)
def factory_without_device(evidence: Evidence) -> Iterator[Found]:
    """A tensor made in the forward without a device.

    It is made on the CPU and meets tensors of the GPU, which fails there, and only there.

    Bad:
        mask = torch.ones(x.shape[1])

    Good:
        mask = torch.ones(x.shape[1], device=x.device)

    Fix: pass `device=`.
    """
    reported = set()
    for meeting in evidence.meetings:
        place = dataclasses.replace(meeting.made, note="") if meeting.made is not None else None
        if place is None or meeting.maker in _MOVES or place in reported:
            continue
        reported.add(place)
        related = (dataclasses.replace(meeting.place, note="it meets the GPU here"),) if meeting.place else ()
        message = (
            f"this tensor of shape {meeting.shape} is made on the CPU, and '{meeting.operator}' needs it elsewhere"
        )
        yield Found(message, place, meeting.module, related, fix=_fix(evidence, place))


@rule("FX203", Severity.ERROR, once_a_line=True)
def device_mismatch(evidence: Evidence) -> Iterator[Found]:
    """A tensor on the CPU that meets the model's device.

    It fails on a GPU with `Expected all tensors to be on the same device`.

    Bad:
        MEAN = torch.zeros(3)
        ...
        return x - MEAN

    Good:
        self.register_buffer("mean", torch.zeros(3))

    Fix: register the tensor as a buffer, or move it to the device of the input.
    """
    for meeting in evidence.meetings:
        # A tensor that an attribute holds has a rule of its own, and so has one that the forward makes or moves.
        if meeting.attribute is None and meeting.place is not None and meeting.made is None:
            message = f"'{meeting.operator}' is given a CPU tensor of shape {meeting.shape} beside tensors of the GPU"
            yield Found(message, meeting.place, meeting.module)
    if not evidence.meetings and evidence.on_gpu is not None and evidence.on_gpu.error:
        message = f"it runs on the CPU, and on {evidence.on_gpu.device} the forward raises {evidence.on_gpu.error}"
        yield Found(message, evidence.on_gpu.place)
