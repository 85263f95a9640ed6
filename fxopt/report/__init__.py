"""Renderings of a record. Nothing is measured here, and nothing is known but what the record says."""

from __future__ import annotations

from collections.abc import Callable

from fxopt.errors import SpecError
from fxopt.record import Record, check_version
from fxopt.report.json import as_json
from fxopt.report.markdown import markdown
from fxopt.report.table import table

__all__ = ["FORMATS", "as_json", "markdown", "render", "table"]

FORMATS: dict[str, Callable[[Record], str]] = {"table": table, "markdown": markdown, "json": as_json}
"""Renderings by the name that `--format` takes."""


def render(record: Record, format: str = "table") -> str:
    """A record as text that ends in a newline.

    Args:
        record: of this major version of the schema.
        format: "table" for a terminal, "markdown" or "json".

    Raises:
        SpecError: for a format that is not there.
        ArtifactError: for a record of another version.
    """
    if format not in FORMATS:
        raise SpecError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    check_version(record)
    return FORMATS[format](record)
