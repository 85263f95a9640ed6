"""Options and arguments that several commands have."""

import enum
from pathlib import Path
from typing import Annotated

import typer

MOST_SEED = 2**32 - 1
"""NumPy takes no larger one."""
MOST_THREADS = 2**12
"""More than any machine has cores; torch does not refuse what the system can't start."""


class Format(enum.StrEnum):
    """A table to read, Markdown to paste, or JSON to read by machine."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"


class Device(enum.StrEnum):
    """What to measure on."""

    CPU = "cpu"
    CUDA = "cuda"
    ALL = "all"

    @property
    def names(self) -> tuple[str, ...]:
        """As torch calls them."""
        return ("cpu", "cuda") if self is Device.ALL else (self.value,)


TargetName = Annotated[
    str, typer.Argument(help="model.py, model.py:Name, package.module or package.module:name.", metavar="TARGET")
]
InputTexts = Annotated[
    list[str] | None,
    typer.Option("--input", help="1x3x224x224, or ids=1x128:int64:0..30000; repeatable.", metavar="INPUT"),
]
Weights = Annotated[
    Path | None, typer.Option(help="Load these weights first: safetensors or a saved state_dict.", metavar="FILE")
]
Style = Annotated[Format, typer.Option("--format", help="How to print the report.")]
Seed = Annotated[int, typer.Option(help="Of everything random.", min=0, max=MOST_SEED)]
Train = Annotated[bool, typer.Option("--train", help="Keep the module in the mode its file left it in.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the report only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
