"""The forms in which a command prints."""

import enum


class Format(str, enum.Enum):
    """A table to read, Markdown to paste, or JSON to read by machine."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"
