"""What the run on a device that does not exist finds."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.findings import Place


@dataclass(frozen=True)
class Meeting:
    """An operator that was given tensors of two devices.

    Attributes:
        operator: its name.
        place: the user's line.
        module: qualified name.
        made: where the tensor on the CPU was made; None where that was before the forward.
        maker: the operator that made it, or "".
        attribute: `module path, name` where it is an attribute that no module has registered.
        shape: of the tensor on the CPU.
    """

    operator: str
    place: Place | None
    module: str
    made: Place | None
    maker: str
    attribute: tuple[str, str] | None
    shape: tuple[int, ...]
