"""The graph in the making: nodes in the order of calls, where they come from, and what they can't hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.fx as fx
from torch.overrides import _pop_mode_temporarily

from fxopt.capture.captured import Guard
from fxopt.capture.frames import user_source


class Unrecordable(Exception):
    """A value that no node can stand for."""


class Tape:
    """Nodes and reasons, each with the module and the user's line that made it.

    Attributes:
        graph: the graph.
        whole: the same, but while a function under vmap is recorded: then `graph` is that function's.
        stack: paths of the modules whose forward is running.
        active: whether calls are recorded now.
        done: whether the recording is complete: numbers that outlive it guard nothing.
        blocked: modules that did what can't be recorded: path -> (reason, location).
        guards: what was assumed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = self.whole = fx.Graph()
        self.stack: list[str] = [""]
        self.active = False
        self.done = False
        self.blocked: dict[str, tuple[str, str]] = {}
        self.guards: dict[Guard, None] = {}

    @property
    def path(self) -> str:
        """The module whose forward is running."""
        return self.stack[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run code without recording it, and without torch noticing that anything is recorded."""
        was, self.active = self.active, False
        try:
            with _pop_mode_temporarily():
                yield
        finally:
            self.active = was

    @contextmanager
    def noting_errors(self, name: str) -> Iterator[None]:
        """Block the running module where a call raises: if it catches that, another input may take the other path.

        A `TypeError` comes of no values or sizes, and is how operators turn each other down.
        """
        try:
            yield
        except TypeError:
            raise
        except Exception as error:
            self.block(f"it catches the {type(error).__name__} of '{name}'")
            raise

    def block(self, reason: str, path: str | None = None) -> None:
        """Note that the running module did what can't be recorded; recording goes on to find the others."""
        source = user_source()
        self.blocked.setdefault(self.path if path is None else path, (reason, str(source or "")))

    def emit(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """Append a node whose arguments are nodes and literals already."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["module_path"] = self.path
        source = user_source()
        if source is not None:
            node.meta["source"] = source
        return node
