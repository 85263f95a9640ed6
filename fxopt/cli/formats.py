"""What several commands let the user choose from."""

import enum


class Format(enum.StrEnum):
    """A table to read, Markdown to paste, or JSON to read by machine."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"


class Device(enum.StrEnum):
    """What to measure on."""

    CPU = "cpu"
    CUDA = "cuda"
    ALL = "all"

    @property
    def names(self) -> tuple[str, ...]:
        """As torch calls them."""
        return ("cpu", "cuda") if self is Device.ALL else (self.value,)
