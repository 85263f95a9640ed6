"""The command line: `main` is what the console script calls. One file a subcommand, none with logic of its own."""

from __future__ import annotations

import gc
import sys
import traceback

from fxopt.errors import FxoptError


def main() -> None:
    """Run the command in `sys.argv` and exit: 0 fine, 1 a promise, a check or a gate failed, 2 a wrong call."""
    from fxopt.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="fxopt")
    except FxoptError as error:
        _fail(error, str(error), error.exit_code)
    except Exception as error:
        said, of_model = f"{type(error).__name__}: {_first_line(error)}", _of_model(error)
        if of_model is not None:
            _fail(error, f"{said}; {of_model}", 2)
        hint = "" if _debug() else "; `--debug` shows where"
        _fail(error, f"unexpected {said}{hint}", 1)
    finally:
        # The interpreter collects as it ends, which takes half a second over all that torch has imported.
        gc.freeze()


def _fail(error: Exception, message: str, code: int) -> None:
    if _debug():
        traceback.print_exception(error)
    print(f"fxopt: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _of_model(error: Exception) -> str | None:
    """What capture says of an error that the user's own model raised."""
    if "fxopt.capture" not in sys.modules:
        return None
    from fxopt.capture.blame import said_of

    return said_of(error)


def _debug() -> bool:
    return "--debug" in sys.argv


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
