"""What several commands let the user choose from."""

import enum

MOST_SEED = 2**32 - 1
"""NumPy takes no larger one."""
MOST_THREADS = 2**12
"""More than any machine has cores; torch does not refuse what the system can't start."""


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
