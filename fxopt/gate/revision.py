"""What git knows: the revision to compare with, checked out where it disturbs nobody, and what lies on top of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fxopt.errors import BaselineError, GateError

_PREFIX = "fxopt-ci-"
_PREFIXES = (_PREFIX, "fxopt-gate-")
"""Of temporary directories, before the id of the process that made them."""
_SUBMODULE = "160000"
"""Its mode in git's listings."""


@dataclass(frozen=True)
class Repository:
    """A working tree.

    Attributes:
        root: its top directory.
        below: where in it the command was called; targets are relative to that.
    """

    root: Path
    below: Path

    @classmethod
    def here(cls) -> Repository:
        """The one that holds the current directory.

        Raises:
            GateError: where there is none, or no git.
        """
        if shutil.which("git") is None:
            raise GateError("there is no 'git' on the path, and a gate compares with a revision: install it")
        done = git(Path.cwd(), "rev-parse", "--show-toplevel")
        if done.returncode != 0:
            said = done.stderr.strip()
            if "not a git repository" not in said:  # but one that git refuses, as where another user owns it
                raise GateError(f"git can't use the repository that '{Path.cwd()}' is in: {said}")
            raise GateError(
                f"'{Path.cwd()}' is in no git repository, and a gate compares with a revision: run it inside of one"
            )
        root = Path(done.stdout.strip()).resolve()
        return cls(root, Path.cwd().resolve().relative_to(root))

    def resolve(self, revision: str) -> str:
        """The full hash of a commit.

        Raises:
            GateError: where there is no such commit; it says how to get it.
        """
        # After `--end-of-options` nothing that a user typed is taken for an option of git.
        done = git(self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        if done.returncode == 0:
            return done.stdout.strip()
        advice = "`git branch --all` and `git tag` list what there is"
        if revision == "HEAD":
            advice = "nothing was committed there yet: commit the model first"
        remote, slash, branch = revision.partition("/")
        if slash and remote in git(self.root, "remote").stdout.split():
            # By both names: a clone of one branch would fetch another one into FETCH_HEAD alone.
            advice = f"`git fetch {remote} {branch}:refs/remotes/{revision}` gets it, if it is there"
        elif git(self.root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true":
            advice = "this clone is shallow: fetch the history first, by `git fetch --unshallow` or `fetch-depth: 0`"
        raise GateError(f"there is no commit '{revision}' in '{self.root}'; {advice}")

    def changes(self) -> str:
        """What the working tree holds beyond its commit, as a diff; untracked files by what tells that one was written.

        "" where it is clean.
        """
        listed = git(self.root, "ls-files", "--others", "--exclude-standard", "-z").stdout.split("\0")
        untracked = []
        for name in filter(None, listed):
            with contextlib.suppress(OSError):  # it is gone, or its name is no UTF-8
                stat = (self.root / name).lstat()
                name += f" {stat.st_size} {stat.st_mtime_ns}"
            untracked.append(name)
        return "\n".join([*untracked, git(self.root, "diff", "HEAD").stdout]).strip()

    def uncommitted(self, but: Path | None = None) -> list[str]:
        """Files of the working tree that differ from its commit, and those that it lacks; a new folder as one.

        Args:
            but: a file that does not count.
        """
        counted = ["--", "."]
        if but is not None and but.is_relative_to(self.root):
            counted.append(f":(exclude,literal){but.relative_to(self.root)}")
        lines = git(self.root, "status", "--porcelain", "--untracked-files=normal", *counted).stdout.splitlines()
        return [line[3:].rpartition(" -> ")[2].strip('"') for line in lines]

    def changed_files(self, base: str) -> list[str]:
        """Tracked files of the working tree that differ from a commit."""
        return git(self.root, "diff", "--name-only", base).stdout.splitlines()

    def renamed_from(self, path: Path, base: str) -> Path | None:
        """Where a tracked file of the working tree was at a commit; None where git knows of no renaming."""
        listed = git(self.root, "diff", "--name-status", "--find-renames", "--diff-filter=R", "-z", base).stdout
        fields = iter(listed.split("\0")[:-1])
        for _, old, new in zip(fields, fields, fields, strict=True):
            if self.root / new == path:
                return self.root / old
        return None

    def private(self, name: str) -> Path:
        """A path under git's own directory, where it makes no tree dirty."""
        return self.root / git(self.root, "rev-parse", "--git-path", name).stdout.strip()

    @contextlib.contextmanager
    def checked_out(self, commit: str) -> Iterator[Path]:
        """A commit in a directory of its own, with the submodules that the working tree has; it is gone afterwards.

        Raises:
            GateError: where git can't check it out.
        """
        _sweep(self.root)
        directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")).resolve()
        tree = directory / "base"
        try:
            _check_out(self.root, commit, tree)
            yield tree
        finally:
            _remove(self.root, directory)


def compare_with(repository: Repository, base: str) -> str:
    """The commit that a change is held against: where it left `base`, so that what came there since does not count.

    Raises:
        BaselineError: where the two have no common ancestor here.
    """
    commit = repository.resolve(base)
    done = git(repository.root, "merge-base", commit, "HEAD")
    if done.returncode == 0:
        return done.stdout.strip()
    shallow = git(repository.root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
    advice = "; this clone is shallow: `git fetch --unshallow`, or `fetch-depth: 0` in a workflow" if shallow else ""
    raise BaselineError(f"'{base}' and HEAD have no common ancestor{advice}")


def _check_out(root: Path, commit: str, tree: Path) -> None:
    """Put a commit of the repository at `root` into a new or empty directory, and those of its submodules below."""
    # A hook of the user's is for their own working tree: one may install packages, and one that fails stops git.
    quietly = ("-c", f"core.hooksPath={os.devnull}")
    done = git(root, *quietly, "worktree", "add", "--detach", "--quiet", str(tree), commit)
    if done.returncode != 0:
        raise GateError(f"cannot check out '{commit}' of '{root}' beside the working tree: {done.stderr.strip()}")
    for path in _submodules(root):
        mode, *_, pinned = git(root, "ls-tree", commit, "--", path).stdout.split()[:3] or ("", "")
        if mode == _SUBMODULE:
            # From the clone that is here already: git's own way would ask the network for another.
            _check_out(root / path, pinned, tree / path)


def _submodules(root: Path) -> list[str]:
    """Paths of those that the working tree at `root` has checked out."""
    listed = [line.partition("\t") for line in git(root, "ls-files", "--stage", "-z").stdout.split("\0")]
    return [path for facts, _, path in listed if facts.startswith(_SUBMODULE) and (root / path / ".git").exists()]


def _repositories(root: Path) -> Iterator[Path]:
    """The working tree at `root`, and those of its submodules."""
    yield root
    for path in _submodules(root):
        yield from _repositories(root / path)


def _sweep(root: Path) -> None:
    """Remove what a run that was killed outright has left behind: directories, and worktrees in git's lists."""
    for prefix in _PREFIXES:
        for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
            if _is_left_behind(directory):
                shutil.rmtree(directory, ignore_errors=True)
    _forget(root, _is_left_behind)


def _is_left_behind(directory: Path) -> bool:
    prefix = next((prefix for prefix in _PREFIXES if directory.name.startswith(prefix)), None)
    pid = "" if prefix is None else directory.name.removeprefix(prefix).partition("-")[0]
    return pid.isdigit() and not _alive(int(pid))


def _remove(root: Path, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    _forget(root, lambda other: other == directory)


def _forget(root: Path, is_gone: Callable[[Path], bool]) -> None:
    """Remove directories that are to be gone, and the worktrees in them from git's lists."""
    # Never `git worktree prune`: it forgets the user's own worktrees too, where their disk is not mounted right now.
    for repository in _repositories(root):
        for line in git(repository, "worktree", "list", "--porcelain").stdout.splitlines():
            kind, _, path = line.partition(" ")
            gone = next(filter(is_gone, Path(path).parents), None)
            if kind == "worktree" and gone is not None:
                shutil.rmtree(gone, ignore_errors=True)
                git(repository, "worktree", "remove", "--force", "--force", path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def git(
    directory: Path, *arguments: str, given: str | None = None, index: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run git in a directory, with its own repository and index, or with this index."""
    # Hooks run with GIT_DIR set, which would point the worktree's git at the wrong index.
    kept = {
        name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE")
    }
    own = {"LC_ALL": "C"} | ({} if index is None else {"GIT_INDEX_FILE": str(index)})
    # Names that are not ASCII come as they are, not as octal numbers.
    return subprocess.run(
        ["git", "-c", "core.quotePath=false", *arguments],
        cwd=directory,
        env=kept | own,
        input=given,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
