"""A run on the GPU of this machine, beside one on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.engines.gpu import products_in_float32
from fxopt.findings import Place, Subject
from fxopt.relative_error import relative_error
from passes.audit.evidence.driver import call, copied, floating, kept
from passes.audit.evidence.places import raised

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class OnDevice:
    """What came of the run.

    Attributes:
        device: where it was.
        error: what the forward raised there, and not on the CPU; "" where it ended.
        place: the user's line that raised.
        difference: the largest relative error of an output, of that on the CPU.
    """

    device: str
    error: str = ""
    place: Place | None = None
    difference: float = 0.0


def run_on_device(subject: Subject) -> OnDevice:
    """One forward on the CPU, and one on the GPU.

    Raises:
        Exception: what the forward raises on the CPU.
    """
    expected = _outputs(subject, torch.device("cpu"))
    try:
        with products_in_float32(tf32=False):  # the rounding of TF32 is no fault of the model
            found = _outputs(subject, DEVICE)
    except Exception as error:  # whatever a user's model raises
        first = (str(error).splitlines() or ["no message"])[0]
        return OnDevice(str(DEVICE), f"{type(error).__name__}: {first}", raised(error))
    pairs = zip(expected, found, strict=True)
    return OnDevice(str(DEVICE), difference=max((relative_error(want, got.cpu()) for want, got in pairs), default=0.0))


def _outputs(subject: Subject, device: torch.device) -> list[torch.Tensor]:
    assert subject.inputs is not None
    with kept(), torch.no_grad():
        moved = Subject(subject.name, subject.module, subject.inputs.to(device))
        return floating(call(copied(subject, training=False).to(device), moved))
