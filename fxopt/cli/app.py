"""The subcommands put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fxopt.cli.audit import audit
from fxopt.cli.baseline import app as baseline
from fxopt.cli.bench import bench
from fxopt.cli.ci import ci
from fxopt.cli.explain import explain
from fxopt.cli.lora import app as lora
from fxopt.cli.passes import passes
from fxopt.cli.run import Run, run
from fxopt.version import __version__


class _Group(TyperGroup):
    """Ends on Ctrl-C as a shell expects, whatever the version of typer makes of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("fxopt: interrupted; no report was written", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    help="Optimize a PyTorch model by verified rewrites of its graph, and measure what that gained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options short
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command(cls=Run)(run)
app.command()(passes)
app.add_typer(lora, name="lora")
app.command()(audit)
app.command()(explain)
app.command()(bench)
app.command()(ci)
app.add_typer(baseline, name="baseline")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxopt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of `fxopt` itself."""
