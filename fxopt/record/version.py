"""The version of records, and the schema that other programs can hold them against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fxopt.errors import ArtifactError

SCHEMA = "1.6"
"""Version of the record: the first number changes when old readers can't read it any more."""


def schema(kind: str = "run") -> dict[str, Any]:
    """The JSON Schema of a record: of "run", or of the `kind` that it says, "bench", "ci" or "baseline"."""
    name = "record.schema.json" if kind == "run" else f"record/{kind}.schema.json"
    text = resources.files("fxopt").joinpath(name).read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def check_version(record: Mapping[str, Any]) -> None:
    """Make sure that this fxopt can read a record.

    Raises:
        ArtifactError: where it has another major version, or none.
    """
    version = str(record.get("schema", "none"))
    if version.partition(".")[0] != SCHEMA.partition(".")[0]:
        raise ArtifactError(
            f"cannot read a record of schema {version!r}: this fxopt reads {SCHEMA!r}; run `fxopt run` again, or use "
            f"the version of fxopt that wrote it"
        )
