"""The record itself, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def as_json(record: Mapping[str, Any]) -> str:
    """The record as JSON text; a number that JSON lacks would be a bug, so it is refused."""
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
