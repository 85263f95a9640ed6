"""The reports of a gate: table, Markdown, JUnit, annotations, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fxopt.errors import EngineError, SpecError
from fxopt.report import github, junit, render
from tests.report.ci_example import example

page_of = pytest.importorskip("fxopt.report.page").page
check_page = pytest.importorskip("fxopt.report.page").check
HISTORY = [
    {"target": "model.py:Net", "device": "cpu", "commit": f"{index}" * 40, "median_ms": 5 + 0.1 * index % 0.3}
    | {"low_ms": 4.9, "high_ms": 5.4, "inputs": "1x3x48x48 float32", "machine": {"cpu": "X"}}
    for index in range(8)
]


def test_table_and_markdown_say_the_verdict_the_cause_and_the_rest():
    for style in ("table", "markdown"):
        text = " ".join(render(example(), style).replace("\\", "").split())
        for said in (
            "REGRESSION",
            "+22.0 % [+20.0 %, +24.0 %]",
            "origin/main",
            "the working tree: abcdef0 with uncommitted changes in 4 files: model.py, layers.py, a.py and 1 more",
            "20.0 s, 8.50 s of it in the model's timed calls",
            "890.0 % more",
        ):
            assert said in text, (style, said)
        assert "caused by the pass 'fuse': 'head.bn' (model.py:20) is no longer folded" in text
        assert "not in the base" in text and "by up to 30.0 %" in text
        assert "+0.1 % after the model itself" in text


def test_the_terminal_is_narrow():
    record = example()
    record["targets"][0]["latency"]["verdict"] = "INCONCLUSIVE"
    record["targets"][0]["checks"][0]["message"] = "more than is allowed of it " * 6
    text = render(record)
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(text.split()).count("more than is allowed") == 12


def test_a_new_target_is_noted_and_not_called_wrong():
    record = example()
    record["targets"] = [target for target in record["targets"] if target["verdict"] == "new"]
    for style in ("table", "markdown"):
        text = render(record, style)
        assert "not in the base" in text and "wrong" not in text
    page = page_of(record)
    assert "<p>not in the base</p>" in page and "✗" not in page


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({}, "1234567, where HEAD left 'origin/main'"),
        ({"commit": "1234567890"}, "1234567 (origin/main) machine"),
        ({"commit": "1234567890", "dirty": False}, "(origin/main); both are the same code: name the revision"),
    ],
)
def test_what_was_compared_is_said(head, said):
    record = example()
    record["head"] |= head
    assert said in " ".join(render(record).split())


def test_junit_has_a_case_a_check():
    top = ElementTree.fromstring(junit(example()))
    assert [suite.get("name") for suite in top] == ["digits & letters", "new", "noisy"]
    assert {key: top.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "2",
        "errors": "0",
        "skipped": "3",
    }
    failed = top.find(".//testcase[@name='latency']/failure")
    assert failed is not None and "caused by the pass 'fuse'" in str(failed.get("message"))


def test_annotations_are_one_line_each_at_the_file():
    lines = github(example()).splitlines()
    assert lines[0].startswith(
        "::error file=bench/model.py,title=fxopt ci%3A digits & letters%3A REGRESSION::latency on cpu"
    )
    assert "+22.0 %25" in lines[0] and lines[1].endswith("::size: 890.0 %25 more")
    assert lines[2].startswith("::notice file=bench/new.py,") and lines[2].endswith("::not in the base")


def test_what_the_page_needs_is_known_before_there_is_a_record(monkeypatch):
    for url in ("{path}", "{file.name}", "{line:d}", "", "blob/main"):
        with pytest.raises(SpecError, match="--source-url"):
            check_page(f"https://example.com/{url}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="--html needs 'jinja2'"):
        check_page()


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.urls += [str(value) for name, value in attrs if name in ("href", "src") and value and value[0] != "#"]


def test_the_page_needs_nothing_else_and_escapes_what_the_user_wrote():
    text = page_of(example(), HISTORY, "https://example.com/{file}#L{line}")
    found = Links()
    found.feed(text)
    assert not found.tags & {"script", "link", "img", "iframe"}
    assert set(found.urls) == {f"https://example.com/net/model.py#L{line}" for line in (12, 13, 15, 20)}
    assert "used twice &lt;b&gt;" in text and "digits &amp; letters" in text
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert text.index("REGRESSION") < text.index("<table")


def links_of(record, **facts: str):
    found = Links()
    for target in record["targets"]:
        for nodes in (target["graphs"] or {}).values():
            for node in nodes:
                node |= facts if node["file"] else {}
    found.feed(page_of(record, source_url="https://example.com/{file}#L{line}"))
    return found.urls


def test_links_lead_to_files_of_any_name():
    assert "https://example.com/net/my%20%23%20m%C3%B6del.py#L15" in links_of(example(), file="../net/my # mödel.py")


def test_where_two_files_have_one_name_a_skip_leads_to_neither():
    record = example()
    assert "https://example.com/net/model.py#L20" in links_of(record)
    head = record["targets"][0]["graphs"]["head"]
    head.append(head[-1] | {"name": "other", "file": "../other/model.py"})
    urls = links_of(record)
    assert "https://example.com/other/model.py#L15" in urls
    assert not any(url.endswith("#L20") for url in urls) and "head.bn model.py:20" in page_of(record)


def test_the_history_is_that_of_machines_like_the_newest():
    other = [one | {"commit": "other machine", "machine": {"cpu": "Y"}} for one in HISTORY[:2]]
    page = page_of(example(), other + HISTORY)
    assert "Left out: 2 on other machines or with other inputs" in page and not re.search(r">\s*other m\s*<", page)
    assert re.search(r">\s*0000000\s*<", page) and "Left out" not in page_of(example(), HISTORY)


def test_a_pass_that_runs_twice_has_two_bars():
    record = example()
    names = ["the model itself", "clean", "fuse", "clean"]
    record["targets"][0]["cause"]["ladder"] = [{"after": name, "ratio": 1.1} for name in names]
    labels = re.findall(r"<text[^>]*>\s*([^<]+?)\s*</text>", page_of(record))
    assert [label for label in labels if label in names] == names[::-1]


def test_the_page_in_a_browser(tmp_path):
    """At the width of a desktop and of a phone: nothing is fetched, nothing is wider than the screen."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser_path is None:
        pytest.skip("needs a browser: chromium or google-chrome on the path")
    file = tmp_path / "page.html"
    file.write_text(page_of(example(), HISTORY), encoding="utf-8")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        try:
            for width in (1280, 375):
                screen = browser.new_page(viewport={"width": width, "height": 800})
                fetched: list[str] = []
                screen.on("request", lambda request: fetched.append(request.url))  # noqa: B023
                screen.goto(file.as_uri())
                assert fetched == [file.as_uri()]
                assert screen.evaluate("document.documentElement.scrollWidth") <= width
                assert screen.locator("h1").inner_text() == "✗ REGRESSION"
                assert screen.locator("svg[role=img]").count() == 5
                assert all(plot.bounding_box()["width"] > 500 for plot in screen.locator("svg").all())
                said = screen.get_by_text("failed: 890.0 % more").bounding_box()
                assert said["x"] + said["width"] <= width, "a check can be read without scrolling"
                changed = screen.locator("tr.changed").first.locator("td").all_inner_texts()
                assert changed == ["+", "", "stem.1 = BatchNorm2d model.py:13"]
                screen.screenshot(path=tmp_path / f"{width}.png", full_page=True)
        finally:
            browser.close()
