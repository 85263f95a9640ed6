"""One self-contained page of HTML: no script, no network, readable on a phone and without colour."""

from __future__ import annotations

import difflib
import importlib.util
import posixpath
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from urllib.parse import quote

from fxopt.errors import EngineError, SpecError
from fxopt.gate.baseline import differences
from fxopt.report.ci import cause, ci_sections, failures, in_repository, verdict_row
from fxopt.report.page.plots import distributions, ladder, over_time

_SIGNS = {"REGRESSION": "✗", "OK": "✓", "FASTER": "✓", "INCONCLUSIVE": "?", "new": "?", "not comparable": "?"}


def check(source_url: str | None = None) -> None:
    """What `page` would raise, before there is a record."""
    for name in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise EngineError(f"--html needs '{name}': `pip install 'fxopt[html]'`")
    if source_url is None:
        return
    wrong = SpecError(f"--source-url: '{source_url}' is none: expected {{file}} and {{line}} to fill in")
    try:
        first, second = (source_url.format(file=file, line=line) for file, line in (("model.py", "1"), ("net.py", "2")))
    except (LookupError, ValueError, AttributeError) as error:
        raise wrong from error
    if first == second:
        raise wrong


def page(
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    source_url: str | None = None,
) -> str:
    """The record of `fxopt ci` as a page.

    Args:
        record: of kind "ci".
        history: entries of `fxopt baseline` to plot, oldest first.
        source_url: where lines of code can be seen, with `{file}` and `{line}` to fill in.

    Raises:
        EngineError: where the libraries for it are not installed.
        SpecError: for a URL with other things to fill in.
    """
    check(source_url)
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = resources.files("fxopt.report.page").joinpath("page.html").read_text(encoding="utf-8")
    links = _Links(record, source_url)
    targets = [_target(target, history, links) for target in record["targets"]]
    worst = next((one["verdict"] for sign in ("✗", "?", "✓") for one in targets if one["sign"] == sign), "OK")
    return environment.from_string(text).render(
        record=record,
        head=ci_sections(record)[0],
        targets=targets,
        worst=worst,
        sign=_SIGNS.get(worst, "✗"),
    )


class _Links:
    """Where lines of code can be read: sources name a file without its folder, which the graphs know."""

    def __init__(self, record: Mapping[str, Any], source_url: str | None):
        self._record = record
        self._url = source_url or "{file}#L{line}"
        graphs = [target["graphs"] for target in record["targets"] if target["graphs"]]
        nodes = [node for both in graphs for nodes in both.values() for node in nodes or ()]
        known: dict[str, set[str]] = {}
        for node in nodes:
            known.setdefault(posixpath.basename(node["file"]), set()).add(node["file"])
        self._files = known

    def of(self, source: str, file: str | None = None) -> str | None:
        """The address of `model.py:41`, in this file where that is known.

        None where it is not in the repository, or several files there have that name.
        """
        name, colon, line = source.rpartition(":")
        files = {file} if file else self._files.get(name, {name})
        path = in_repository(self._record, next(iter(files)))
        if not colon or not line.isdigit() or path.startswith("../") or len(files) > 1:
            return None
        return self._url.format(file=quote(path), line=line)


def _target(target: Mapping[str, Any], history: Sequence[Mapping[str, Any]], links: _Links) -> dict[str, Any]:
    latency, found = target["latency"], target["cause"]
    own = [one for one in history if one["target"] == target["target"] and one["device"] == target["device"]]
    comparable = [one for one in own if not differences(one, own[-1])]
    return {
        "name": target["name"],
        "verdict": target["verdict"],
        "sign": _SIGNS.get(target["verdict"], "✗"),
        "row": verdict_row(target),
        "wrong": failures(target),
        "cause": cause(target).removeprefix("; "),
        "notes": target["notes"],
        "checks": target["checks"],
        "latency": latency,
        "distributions": distributions(latency["times"]) if latency else None,
        "ladder": ladder(found["ladder"]) if found else None,
        "history": over_time(comparable) if own else None,
        "incomparable": len(own) - len(comparable),
        "graph": _side_by_side(target["graphs"], links),
        "skips": [
            {"pass": entry["name"], **skip, "link": links.of(skip["source"])}
            for entry in target["passes"]
            for skip in entry["skips"]
        ],
    }


def _side_by_side(graphs: Mapping[str, Any] | None, links: _Links) -> list[dict[str, Any]]:
    """Rows of the two graphs: `mark` is "", "-", "+" or "~" for a node that is not on both sides as it is."""
    if not graphs or graphs["base"] is None or graphs["head"] is None:
        return []
    base, head = graphs["base"], graphs["head"]
    names: list[list[str]] = [
        ["\n".join((node["op"], node["what"], node["name"])) for node in side] for side in (base, head)
    ]
    rows: list[dict[str, Any]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, names[0], names[1], autojunk=False).get_opcodes():
        for offset in range(max(b - a, d - c)):
            left = base[a + offset] if a + offset < b else None
            right = head[c + offset] if c + offset < d else None
            mark = "" if kind == "equal" else "~" if left and right else "-" if left else "+"
            cells = [node and {**node, "link": links.of(node["source"], node["file"])} for node in (left, right)]
            rows.append({"mark": mark, "base": cells[0], "head": cells[1]})
    return rows
