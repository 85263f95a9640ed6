"""An explanation as text, as Markdown, as JSON, and as a drawing for Graphviz."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator

from tabulate import tabulate

from fxopt.explain.explanation import Explanation, Part
from fxopt.markdown import escaped

_HIDDEN = ("getitem", "getattr", "reads", ".size")
"""Calls that a reader of the text does not look for, beside the guards, which are listed apart."""


def render(explanation: Explanation, form: str) -> str:
    """Write an explanation in one of `FORMS`, with a line feed at the end."""
    return FORMS[form](explanation).rstrip("\n") + "\n"


def _text(explanation: Explanation) -> str:
    blocks = [_summary(explanation)]
    for part in explanation.parts:
        table = tabulate(_rows(part, explanation), tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
        blocks.append(f"{_title(part)}\n{_indented(table)}")
    blocks += [f"{title}\n{_indented(chr(10).join(lines))}" for title, lines in _lists(explanation)]
    return "\n\n".join(blocks)


def _markdown(explanation: Explanation) -> str:
    blocks = [f"## {escaped(_summary(explanation))}"]
    for part in explanation.parts:
        heading = ["", "call", "result", "source"]
        rows = [list(map(escaped, row)) for row in _rows(part, explanation)]
        blocks.append(
            f"### {escaped(_title(part))}\n\n{tabulate(rows, heading, tablefmt='pipe', disable_numparse=True)}"
        )
    for title, lines in _lists(explanation):
        blocks.append(f"### {title}\n\n" + "\n".join(f"- {escaped(line)}" for line in lines))
    return "\n\n".join(blocks)


def _json(explanation: Explanation) -> str:
    return json.dumps(dataclasses.asdict(explanation), indent=2)


def _dot(explanation: Explanation) -> str:
    lines = ["digraph captured {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for number, part in enumerate(explanation.parts):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(_title(part))};"]
        shown = [call for call in part.calls if not call.what.startswith("guard")]
        names = {call.node for call in shown}
        for call in shown:
            label = "\n".join(line for line in (call.name, call.what, call.shape, call.source) if line)
            lines.append(f"    {_quoted(f'{number}.{call.node}')} [label={_quoted(label)}];")
        for call in shown:
            lines += [
                f"    {_quoted(f'{number}.{used}')} -> {_quoted(f'{number}.{call.node}')};"
                for used in call.uses
                if used in names
            ]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Graphviz knows none of JSON's escapes of letters


FORMS: dict[str, Callable[[Explanation], str]] = {"text": _text, "json": _json, "markdown": _markdown, "dot": _dot}


def _summary(explanation: Explanation) -> str:
    coverage = explanation.coverage
    calls, flops, parameters = map(_share, (coverage.call_sites, coverage.flops, coverage.parameters))
    shares = f"{calls} of the calls, {flops} of the FLOPs, {parameters} of the parameters in graph"
    return f"{explanation.target} on {explanation.inputs}: {shares}"


def _share(part: float) -> str:
    """A share of 1; only all of it reads as 100%, and only nothing as 0%."""
    text = f"{part:.0%}"
    return text if text not in ("0%", "100%") or part in (0, 1) else f"{min(max(part, 0.001), 0.999):.1%}"


def _title(part: Part) -> str:
    mode = f", in {part.mode}" if part.mode else ""
    return f"{part.path or 'graph'} ({part.kind}{mode})"


def _rows(part: Part, explanation: Explanation) -> Iterator[list[str]]:
    """One row a call, under a row for the module whose forward makes it."""
    inside = part.path
    for call in part.calls:
        if call.what in _HIDDEN or call.what.startswith("guard"):
            continue
        module = call.module if call.what not in ("input", "output") else part.path
        if module != inside:
            inside = module
            if module != part.path:
                yield ["  " * (_depth(module, part) - 1) + module, f"({explanation.kinds.get(module, '')})", "", ""]
        yield ["  " * _depth(module, part) + call.name, call.what, call.shape, call.source]


def _depth(module: str, part: Part) -> int:
    relative = module[len(part.path) :].strip(".") if part.path else module
    return len(relative.split(".")) if relative else 0


def _lists(explanation: Explanation) -> Iterator[tuple[str, list[str]]]:
    """What is not a graph, each with the line that it comes from."""
    opaque = []
    for part in explanation.opaque:
        change = f"; to have it in the graph, {part.advice}" if part.advice else ""
        where = f" ({part.location})" if part.location else ""
        opaque.append(f"'{part.path or part.kind}' stays as it is: {part.reason}{where}{change}")
    guards = [f"{guard.assumption} ({guard.location})" for guard in explanation.guards]
    constants = [f"{one.name}: {one.description} ({one.location})" for one in explanation.constants]
    for title, lines in (
        ("Opaque", opaque),
        ("Guards", guards),
        ("Constants", constants),
        ("Notes", list(explanation.notes)),
    ):
        if lines:
            yield title, lines


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
