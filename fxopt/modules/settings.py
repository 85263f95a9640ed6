"""What a module has been set to, beside its tensors."""

from __future__ import annotations

from typing import Any


class WithSettings:
    """The mixin of modules that passes put in and that users set further: a result keeps it with their tensors."""

    def settings(self) -> dict[str, Any]:
        """What it is set to, as JSON can hold it.

        Raises:
            PassError: it is in a state that can't be kept; the message says what to do.
        """
        raise NotImplementedError

    def set_to(self, settings: dict[str, Any]) -> None:
        """Set it to what `settings` gave."""
        raise NotImplementedError
