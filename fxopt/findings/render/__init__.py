"""One inspection, many renderings. None of them looks at a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxopt.findings.inspection import Inspection
from fxopt.findings.render.github import github
from fxopt.findings.render.json import as_json
from fxopt.findings.render.junit import junit
from fxopt.findings.render.layers import layers
from fxopt.findings.render.markdown import markdown
from fxopt.findings.render.sarif import sarif
from fxopt.findings.render.text import text
from fxopt.findings.rule import RuleCard

_FORMATS: dict[str, Callable[[Inspection, Sequence[RuleCard]], str]] = {
    "text": text,
    "json": as_json,
    "sarif": sarif,
    "junit": junit,
    "markdown": markdown,
    "github": github,
}


def render(found: Inspection, rules: Sequence[RuleCard], style: str) -> str:
    """Print `found` as `text`, `json`, `sarif`, `junit`, `markdown` or `github`."""
    return _FORMATS[style](found, rules)


__all__ = ["layers", "render"]
