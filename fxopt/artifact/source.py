"""The code that the graphs of a module run, as one file of Python to read."""

from __future__ import annotations

import builtins
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch.fx as fx

from fxopt.graph import GraphModule, source_of
from fxopt.version import __version__

_HEADER = """\
# The code of each graph of {target}, after the passes: {spec}
#
# For reading, and for seeing in a diff what changed: `fxopt.load` runs the graphs themselves. The comment at the
# end of a line is the line of the model that it comes from. Written by fxopt {version}.
"""
_FREED = re.compile(r";\s+(?:\w+ = )+None(?=\s*(?:#|$))")
_INDEXED = re.compile(r"getattr\((self[\w.\[\]]*), \"(\d+)\"\)")
_ASSIGNED = re.compile(r"^\s+(\w+)(?:\s*:[^=]+)? = ")


def source(module: GraphModule, target: str, spec: str) -> str:
    """One class a graph; those inside opaque parts are named after their path."""
    names: dict[str, Any] = {}
    classes: list[str] = []
    for name, graph in _graphs(module):
        code = graph.python_code("self")
        names.update(code.globals)
        classes.append(f"class {name}:\n{_readable(code.src, graph)}")
    used = set(re.findall(r"\w+", "\n".join(classes)))
    imports = sorted(filter(None, (_import(alias, value) for alias, value in names.items() if alias in used)))
    header = _HEADER.format(target=target or "the module", spec=spec or "none", version=__version__)
    return "\n\n".join([header + "\n".join(["", *imports]).rstrip(), *classes]) + "\n"


def _graphs(root: GraphModule) -> Iterator[tuple[str, fx.Graph]]:
    for path, module in root.named_modules():
        if isinstance(module, GraphModule):
            graphs: Mapping[bool | None, fx.Graph] = module.graphs
            for mode, graph in graphs.items():
                suffix = {None: "", True: "_training", False: "_evaluation"}[mode]
                name = type(root).__name__
                yield re.sub(r"\W", "_", f"{name}_{path}" if path else name) + suffix, graph


def _readable(code: str, graph: fx.Graph) -> str:
    """Indented, without the statements that free memory, each line with the user's own."""
    origins = {node.name: source_of(node) for node in graph.nodes}
    lines = []
    for line in code.strip().splitlines():
        line = _FREED.sub("", line.rstrip())
        while (indexed := _INDEXED.sub(r"\1[\2]", line)) != line:
            line = indexed
        assigned = _ASSIGNED.match(line)
        origin = origins.get(assigned.group(1), "") if assigned else ""
        lines.append(f"    {line}  # {origin}" if origin else f"    {line}".rstrip())
    return "\n".join(lines)


def _import(alias: str, value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__}" + ("" if alias == value.__name__ else f" as {alias}")
    if isinstance(value, float):
        return f'{alias} = float("{value}")'
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None or name is None or "<" in name:
        return f"# {alias} = {value!r}".partition("\n")[0]
    if module == builtins.__name__:
        return "" if hasattr(builtins, alias) else f"{alias} = {name if hasattr(builtins, name) else 'type(None)'}"
    head, _, rest = name.partition(".")
    if rest:
        return f"from {module} import {head}\n{alias} = {name}"
    return f"from {module} import {name}" + ("" if alias == name else f" as {alias}")
