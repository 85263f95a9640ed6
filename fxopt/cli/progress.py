"""What a run is doing, on stderr, so that stdout holds the report alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that says which stage has begun: a live line on a terminal, a line a stage elsewhere."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True, quiet=quiet, highlight=False)
    start = time.perf_counter()
    if not console.is_interactive:
        yield lambda stage: console.print(f"{time.perf_counter() - start:6.1f} s  {escape(stage)}", soft_wrap=True)
        return
    wrapped = TextColumn("{task.description}", table_column=Column())
    with Progress(SpinnerColumn(), TimeElapsedColumn(), wrapped, console=console, transient=True) as shown:
        task = shown.add_task("load", total=None)
        yield lambda stage: shown.update(task, description=escape(stage))
