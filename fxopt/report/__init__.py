"""Renderings of a record. Nothing is measured here, and nothing is known but what the record says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from fxopt.errors import SpecError
from fxopt.record import Record, check_version
from fxopt.report.json import as_json
from fxopt.report.markdown import markdown
from fxopt.report.section import Section
from fxopt.report.sections import sections
from fxopt.report.survey import survey_sections
from fxopt.report.table import table

__all__ = ["FORMATS", "render"]

_TEXTS: dict[str, Callable[[Sequence[Section]], str]] = {"table": table, "markdown": markdown}

FORMATS = (*_TEXTS, "json")
"""What `--format` takes."""


def render(record: Record | Mapping[str, Any], format: str = "table") -> str:
    """A record as text that ends in a newline.

    Args:
        record: of this major version of the schema; its `kind` says what it tells of.
        format: "table" for a terminal, "markdown" or "json".

    Raises:
        SpecError: for a format that is not there.
        ArtifactError: for a record of another version.
    """
    if format not in FORMATS:
        raise SpecError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    check_version(record)
    return as_json(record) if format == "json" else _TEXTS[format](_sections(record))


def _sections(record: Mapping[str, Any]) -> list[Section]:
    if record.get("kind") == "bench":
        return survey_sections(record)
    return sections(cast(Record, record))
