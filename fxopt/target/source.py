"""Runs the user's file, or imports the user's module, and says in the user's terms what went wrong in it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import random
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fxopt.errors import FxoptError, LoadError, MissingError


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        label: what the user calls it: `model.py`, `package.module`.
        directory: importable while code of the user's runs.
        namespace: the file or module after it ran.
    """

    label: str
    directory: Path
    namespace: ModuleType

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Run code of the user's: its directory is importable, and what it raises becomes a `LoadError`."""
        with _user_code(doing, self.directory):
            yield


def split(target: str) -> tuple[str, str | None]:
    """`model.py:Net` -> (`model.py`, `Net`); the name is None where there is none."""
    place, colon, name = target.rpartition(":")
    if not colon or os.sep in name or "/" in name:  # a colon in a folder's name, or behind a drive letter
        return target, None
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise LoadError(
            f"cannot read the target '{target}': expected model.py, model.py:Name, package.module or "
            "package.module:name"
        )
    return place, name


def open_source(place: str) -> Source:
    """Run the file, or import the module, that `place` names.

    Raises:
        LoadError: where there is none, or it raises.
    """
    if place.endswith(".py") or os.sep in place or "/" in place or Path(place).is_file():
        return _run_file(place)
    return _import_module(place)


@contextmanager
def same_randomness() -> Iterator[None]:
    """Put the states of the random generators back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _run_file(place: str) -> Source:
    path = Path(place)
    if path.is_dir():
        raise LoadError(f"'{place}' is a directory: expected a Python file that defines a model{_files_in(path)}")
    if not path.is_file():
        raise MissingError(f"there is no file '{place}'{_similar_file(path)}")
    if path.suffix != ".py":
        raise LoadError(
            f"'{place}' is not a Python file: expected one that defines a model; "
            f"weights are given beside it, by `fxopt run model.py --weights {place}`"
        )
    path = path.resolve()
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"Python cannot import '{place}'")
    namespace = importlib.util.module_from_spec(spec)
    # Dataclasses, pickle and inspect look up the module of a class by its name.
    sys.modules[name] = namespace
    try:
        with _user_code(f"cannot load '{place}'", path.parent):
            spec.loader.exec_module(namespace)
    except BaseException:
        del sys.modules[name]
        raise
    return Source(place, path.parent, namespace)


def _import_module(place: str) -> Source:
    if not all(part.isidentifier() for part in place.split(".")):
        raise LoadError(f"there is no file '{place}', and it is not the name of a module either")
    directory = Path.cwd()
    with _user_code(f"cannot load '{place}'", directory):
        try:
            namespace = importlib.import_module(place)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if place != missing and not place.startswith(missing + "."):
                raise
            file = f"{place.replace('.', '/')}.py"
            hint = f"; for a file, `fxopt run {file}`" if Path(file).is_file() else _similar_file(Path(f"{place}.py"))
            raise MissingError(
                f"there is no module '{missing}' in '{directory}' or among the installed packages"
                f"{_elsewhere(missing, directory) or hint}"
            ) from error
    return Source(place, directory, namespace)


def _module_name(path: Path) -> str:
    """A name that is the same each time this file is loaded, and that no other module has."""
    name = f"fxopt_target_{path.stem}" if path.stem.isidentifier() else "fxopt_target"
    taken = sys.modules.get(name)
    if taken is not None and getattr(taken, "__file__", None) != str(path):
        name += "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    return name


@contextmanager
def _user_code(doing: str, directory: Path) -> Iterator[None]:
    path, arguments = list(sys.path), sys.argv
    sys.path.insert(0, str(directory))
    sys.argv = arguments[:1]  # a file that reads the command line must not see fxopt's
    try:
        yield
    except FxoptError:
        raise
    except SyntaxError as error:
        where = f"{Path(error.filename or '?').name}:{error.lineno}"
        line = f": `{error.text.strip()}`" if error.text and error.text.strip() else ""
        raise LoadError(f"{doing}: {where}: {error.msg}{line}") from error
    except (Exception, SystemExit) as error:
        where = _location(error, directory)
        raise LoadError(f"{doing}: {where}{type(error).__name__}: {error}{_advice(error, directory)}") from error
    finally:
        # What the code put there itself stays, behind all else: it may import from there whenever it runs.
        sys.path[:] = path + [entry for entry in sys.path if entry not in path and entry != str(directory)]
        sys.argv = arguments


def _location(error: BaseException, directory: Path) -> str:
    """`model.py:12: `, the last line of the user's that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    environment = Path(sys.prefix)
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(directory) and not Path(frame.filename).is_relative_to(environment)
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}: " if own else ""


def _advice(error: BaseException, directory: Path) -> str:
    if isinstance(error, ImportError) and error.name and (hidden := _hidden(error.name, directory)):
        return f"; '{hidden}' is not what is imported: another module has that name, so rename it"
    if isinstance(error, ModuleNotFoundError):
        return _elsewhere(error.name or "", directory) or f"; install it where fxopt runs ({sys.executable})"
    if isinstance(error, ImportError) and "relative import" in str(error):
        return "; a file of a package is loaded by its dotted name: `fxopt run package.module` from above the package"
    if isinstance(error, SystemExit):
        return "; put what should only run as a script under `if __name__ == '__main__':`"
    return ""


def _hidden(module: str, directory: Path) -> Path | None:
    """The file or package of the user's that an installed module of the same name hides."""
    top = module.partition(".")[0]
    taken = getattr(sys.modules.get(top), "__file__", None)
    if taken is None or Path(taken).is_relative_to(directory):
        return None
    return next(filter(Path.exists, (directory / f"{top}.py", directory / top)), None)


def _elsewhere(module: str, directory: Path) -> str:
    """Where a module of the user's lies that can't be imported from here: above, or in `src`."""
    top = module.partition(".")[0]
    for place in (directory / "src", *directory.parents):
        if (place / f"{top}.py").is_file() or any((place / top).glob("*.py")):
            return f"; '{top}' lies in '{place}': install its project by `pip install -e`, or put that on PYTHONPATH"
    return ""


def _similar_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".py"]
    except OSError:
        return f": there is no directory '{path.parent}'"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean '{path.parent / close[0]}'?" if close else ""


def _files_in(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.glob("*.py"))
    return f", such as '{directory / names[0]}'" if names else ""
