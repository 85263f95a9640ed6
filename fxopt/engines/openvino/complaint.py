"""What OpenVINO complains of, without where in its sources it does."""

from __future__ import annotations

_WHERE = ("Exception from", "Check '", "FrontEnd API failed", "While validating", "Summary:")
_LONGEST = 300


def complaint(error: Exception) -> str:
    """The lines of a message that say what is wrong, as one of 300 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_WHERE)]
    text = " ".join((telling or lines)[:3])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
