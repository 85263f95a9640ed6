"""FX203: a tensor on the CPU that meets the model's device."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Found, rule


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
