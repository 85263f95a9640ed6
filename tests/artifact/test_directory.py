"""A result is there completely or not at all, and nothing else is ever harmed."""

from __future__ import annotations

import json

import pytest

from fxopt.artifact import check
from fxopt.artifact.directory import RECIPE, writing
from fxopt.errors import ArtifactError


def fill(directory, content="new", files=("a.txt",)):
    (directory / "a.txt").write_text(content)
    (directory / RECIPE).write_text(json.dumps({"spec": "", "files": [RECIPE, *files]}))


def test_a_free_name_in_new_folders(tmp_path):
    target = tmp_path / "x" / "y" / "result"
    check(target)
    assert list(tmp_path.iterdir()) == []
    with writing(target) as new:
        fill(new)
    assert (target / "a.txt").read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["result"]
    assert target.stat().st_mode & 0o777 == (tmp_path / "x").stat().st_mode & 0o777


def test_an_empty_directory_and_an_older_result_are_replaced(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    for content in ("first", "second"):
        check(target)
        with writing(target) as new:
            fill(new, content)
        assert (target / "a.txt").read_text() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with writing(tmp_path / "link") as new:
        fill(new)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").exists()


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, OSError])
def test_a_failure_leaves_things_as_they_were(tmp_path, failure):
    for target in (tmp_path / "old", tmp_path / "new" / "result"):
        if target.name == "old":
            with writing(target) as new:
                fill(new, "old")
        with pytest.raises(ArtifactError if failure is OSError else failure), writing(target) as new:
            fill(new, "half")
            raise failure
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("open_for", [check, lambda path: writing(path).__enter__()])
def test_what_is_not_a_result_is_left_alone(tmp_path, open_for):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match=r"holds 'thesis.tex', which fxopt did not write, and is left alone"):
        open_for(foreign)
    with pytest.raises(ArtifactError, match="is a file: expected a directory"):
        open_for(foreign / "thesis.tex")
    with pytest.raises(ArtifactError, match="cannot write to"):
        open_for(foreign / "thesis.tex" / "deeper")


def test_a_note_beside_a_result_is_not_lost(tmp_path):
    target = tmp_path / "result"
    with writing(target) as new:
        fill(new)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'notes.txt'"):
        check(target)


def test_a_damaged_recipe_is_not_taken_for_one(tmp_path):
    (tmp_path / RECIPE).write_text("[1")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ArtifactError, match=r"holds 'a.txt', 'recipe.json', which fxopt did not write"):
        check(tmp_path)
