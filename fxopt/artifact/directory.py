"""A directory that is either written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fxopt.errors import ArtifactError

RECIPE = "recipe.json"


def check(directory: Path) -> None:
    """Make sure that a result can be written to `directory`, before much work is put into one.

    Raises:
        ArtifactError: where it holds anything but a result of fxopt, or cannot be written.
    """
    _check_content(directory)
    try:
        with tempfile.TemporaryDirectory(dir=_existing(directory.absolute().parent), prefix=".fxopt-"):
            pass
    except OSError as error:
        raise _unwritable(directory, error) from error


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes `directory` at the end, in place of an older result.

    Whatever is raised meanwhile, Ctrl-C included, leaves things as they were.

    Raises:
        ArtifactError: as `check` does.
    """
    _check_content(directory)
    target = directory.resolve()
    new: list[Path] = []
    temporary: Path | None = None
    try:
        for parent in reversed([target.parent, *target.parent.parents]):
            if not parent.exists():
                new.append(parent)
                parent.mkdir()
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        _replace(target, temporary)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            for parent in reversed(new):
                parent.rmdir()
        if isinstance(error, OSError):
            raise _unwritable(directory, error) from error
        raise


def read_recipe(directory: Path) -> dict[str, Any]:
    """The recipe of a result.

    Raises:
        ArtifactError: where there is none, or it is damaged.
    """
    path = directory / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"'{directory}' holds no result of fxopt: there is no '{RECIPE}'; expected what `fxopt run --out DIR` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read '{path}': {error}; run `fxopt run --out {directory}` again") from error
    if not isinstance(recipe, dict) or "spec" not in recipe:
        raise ArtifactError(f"'{path}' is not a recipe of fxopt: expected what `fxopt run --out DIR` wrote")
    return recipe


def _check_content(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ArtifactError(f"'{directory}' is a file: expected a directory to write to, or a name that is free")
    present = {entry.name for entry in directory.iterdir()}
    if not present:
        return
    try:
        own = {RECIPE, *read_recipe(directory).get("files", [])}
    except ArtifactError:
        own = set()
    others = sorted(present - own)
    if others:
        shown = ", ".join(f"'{name}'" for name in others[:3]) + (", ..." if len(others) > 3 else "")
        raise ArtifactError(
            f"'{directory}' holds {shown}, which fxopt did not write, and is left alone: choose another directory"
        )


def _replace(target: Path, temporary: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        target.rename(old / "old")
        try:
            temporary.rename(target)
        except BaseException:
            (old / "old").rename(target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _unwritable(directory: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot write to '{directory}': {error.strerror or error}; choose a directory that is yours")
