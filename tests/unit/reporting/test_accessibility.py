"""Every kind of page can be read by a screen reader, by keyboard, in the dark, and with weak eyes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_pages import store, write  # noqa: F401

from robench.papers.definitions import known_tables
from robench.reporting import write_papers
from robench.store import Store

STYLE = Path(__file__).parents[3] / "robench" / "reporting" / "templates" / "style.css"
VOID = {"meta", "input", "img", "br", "link", "hr", "rect", "circle", "line", "polyline"}


class Checker(HTMLParser):
    """Collects what is wrong with a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.landmarks: list[str] = []
        self.ids: list[str] = []
        self.labelled: set[str | None] = set()
        self.fields: list[dict[str, str | None]] = []
        self.texts: list[list[str]] = []
        self.title = ""
        self.feed(text)
        self.close()
        self.finish()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if "id" in facts:
            self.ids.append(str(facts["id"]))
        if tag == "html" and not facts.get("lang"):
            self.problems.append("the page has no language")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in {"main", "header", "footer", "nav"}:
            self.landmarks.append(tag)
        if tag == "img" and not facts.get("alt"):
            self.problems.append(f"an image without a text: {facts.get('src', '')[:40]}")
        if tag == "svg" and facts.get("aria-hidden") != "true" and not facts.get("aria-label"):
            self.problems.append("a drawing without a text")
        if tag == "th" and facts.get("scope") not in {"col", "row"}:
            self.problems.append("a head of a table that heads nothing")
        if tag == "label":
            self.labelled.add(facts.get("for"))
        if tag in {"input", "select", "textarea"}:
            inside = any(name == "label" for name, _ in self.open)
            self.fields.append({**facts, "inside": "yes" if inside else None})
        if facts.get("role") == "region" and not (facts.get("aria-label") and facts.get("tabindex") == "0"):
            self.problems.append("a region that keys do not reach or that has no name")
        if any(name.startswith("on") for name in facts):
            self.problems.append(f"<{tag}> has a script of its own")
        if tag not in VOID:
            self.open.append((tag, facts))
            self.texts.append([str(facts.get("aria-label") or "")])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        found, _ = self.open.pop()
        if found != tag:
            self.problems.append(f"<{found}> is closed by </{tag}>")
        text = " ".join(self.texts.pop()).strip()
        if tag in {"a", "button", "title", "summary", "dt", "h1", "h2"} and not text:
            self.problems.append(f"<{tag}> says nothing")
        if tag == "title":
            self.title = text
        if self.texts:
            self.texts[-1].append(text)

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1].append(data.strip())

    def finish(self) -> None:
        self.problems += [f"<{tag}> is never closed" for tag, _ in self.open]
        if self.headings.count(1) != 1 or self.headings[0] != 1:
            self.problems.append(f"not one first heading: {self.headings}")
        if any(deep > before + 1 for before, deep in zip(self.headings, self.headings[1:], strict=False)):
            self.problems.append(f"a level of headings is left out: {self.headings}")
        if self.landmarks.count("main") != 1 or "header" not in self.landmarks or "footer" not in self.landmarks:
            self.problems.append(f"landmarks are {self.landmarks}")
        if len(set(self.ids)) != len(self.ids):
            self.problems.append("an id comes twice")
        for field in self.fields:
            if not (field["inside"] or field.get("aria-label") or (field.get("id") in self.labelled)):
                self.problems.append(f"a field without a label: {field}")


def test_every_page_passes(store) -> None:  # noqa: F811
    files = write(store)
    pages = {name: text for name, text in files.items() if name.endswith(".html")}
    assert len(pages) > 8
    for name, text in pages.items():
        checked = Checker(text)
        assert checked.problems == [], name
        assert checked.title.endswith("robench")
        assert 'href="#main"' in text, "keys get past the head"
        assert 'name="viewport"' in text


def test_the_papers_pages_pass(tmp_path: Path) -> None:
    """With the figures that are computed, and what the others need."""
    pages = [path for path in write_papers(known_tables(), Store(tmp_path), {}, tmp_path) if path.suffix == ".html"]
    assert len(pages) == 5
    for page in pages:
        assert Checker(page.read_text()).problems == [], page.name


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("<html><body><main></main></body></html>", "no language"),
        ('<html lang="en"><h1>a</h1><h3>b</h3></html>', "left out"),
        ('<html lang="en"><h1>a</h1><img src="x"></html>', "image without"),
        ('<html lang="en"><h1>a</h1><table><tr><th>x</th></tr></table></html>', "heads nothing"),
        ('<html lang="en"><h1>a</h1><select></select></html>', "without a label"),
        ('<html lang="en"><h1>a</h1><a href="x"></a></html>', "says nothing"),
        ('<html lang="en"><h1>a</h1><div role="region" aria-label="a"></div></html>', "keys do not reach"),
        ('<html lang="en"><h1>a</h1><p id="a"></p><p id="a"></p></html>', "id comes twice"),
        ('<html lang="en"><h1>a</h1><svg></svg></html>', "drawing without"),
    ],
)
def test_the_checker_finds_what_is_wrong(broken: str, problem: str) -> None:
    assert any(problem in found for found in Checker(broken).problems)


def luminance(colour: str) -> float:
    """Return the relative luminance (WCAG 2.2)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def palettes() -> dict[str, dict[str, str]]:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)[:2]
    )
    return {"light": light, "dark": {**light, **dark}}


@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_have_contrast(name: str) -> None:
    colours = palettes()[name]
    for ground in ("paper", "card", "tint"):
        for text in ("ink", "soft", "accent", "warm"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for mark in ("accent", "clean", "s0", "s1", "s2", "s3"):
            assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)
    for ground in ("fallen", "standing"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
