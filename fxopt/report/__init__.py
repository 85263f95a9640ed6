"""Renderings of a record. Nothing is measured here, and nothing is known but what the record says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from fxopt.errors import SpecError
from fxopt.record import Record, check_version
from fxopt.report.baseline import baseline_sections
from fxopt.report.ci import ci_sections
from fxopt.report.github import github
from fxopt.report.junit import junit
from fxopt.report.markdown import markdown
from fxopt.report.section import Section
from fxopt.report.sections import sections
from fxopt.report.survey import survey_sections
from fxopt.report.table import table

__all__ = ["FORMATS", "github", "junit", "render"]

_TEXTS: dict[str, Callable[[Sequence[Section]], str]] = {"table": table, "markdown": markdown}

_KINDS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "bench": survey_sections,
    "ci": ci_sections,
    "baseline": baseline_sections,
}

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
    if format == "json":  # a number that JSON lacks would be a bug
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return _TEXTS[format](_sections(record))


def _sections(record: Mapping[str, Any]) -> list[Section]:
    kind = _KINDS.get(str(record.get("kind")))
    return sections(cast(Record, record)) if kind is None else kind(record)
