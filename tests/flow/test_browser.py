"""The pages in a real browser, from disk: sorting, searching, filtering, comparing, on a phone and in the dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser, find_chromium
from scipy.stats import binomtest
from synthetic import card, first_of, put, spec

from robench.papers.definitions import known_tables
from robench.registry import read_cards
from robench.reporting import write_leaderboards, write_papers
from robench.store import Store
from tests.flow.conftest import ROOT

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on the search path; ROBENCH_CHROMIUM may name one"
)
HOSTILE = '"><img src=x onerror=alert(1)>'
MODELS = {"alpha": 45, "beta": 40, "gamma": 20, HOSTILE: 5}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a site") / "reports #1"
    store = Store(root)
    for model, robust in MODELS.items():
        for attack in ("fgsm", "pgd-20"):
            count = robust + (attack == "fgsm")
            # Gamma is right on images that others get wrong.
            put(store, spec(model, attack), ~first_of(50, 50 - count) if model == "gamma" else first_of(50, count))
    put(store, spec("delta", "fgsm"), first_of(50, 50))
    put(store, spec("alpha", "fgsm", threat="Linf@0.1"), first_of(50, 48))
    card(root.parent / "zoo" / "alpha", "alpha")
    card(root.parent / "zoo" / "beta", "beta", threat=None)
    out = root / "leaderboards"
    write_leaderboards(["robustness"], store, read_cards([root.parent / "zoo"]), out)
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_papers_pages_fit_and_draw_their_figures(browser: Browser, tmp_path: Path, width: int, height: int) -> None:
    browser.complaints.clear()
    write_papers(known_tables(), Store(tmp_path), {}, tmp_path)
    browser.resize(width, height)
    try:
        for page in sorted(tmp_path.glob("paper-*.html")):
            browser.open(page)
            assert browser.value("document.documentElement.scrollWidth") <= width, page.name
            boxes = browser.value(
                "[...document.querySelectorAll('.panels .chart, .panels img')].map(e => e.getBoundingClientRect())"
                ".map(r => [r.left, r.right, r.height])"
            )
            assert all(left >= 0 and right <= width and tall > 20 for left, right, tall in boxes), page.name
    finally:
        browser.resize(1280, 900)
    assert browser.complaints == []


TABLE = "robustness-mnist-linf-0.3.html"


def names(browser: Browser) -> list[str]:
    rows = "[...document.querySelector('table').tBodies[0].rows].filter(r => !r.hidden)"
    found: list[str] = browser.value(f"{rows}.map(r => r.cells[1].querySelector('.name').textContent)")
    return found


def click(browser: Browser, title: str) -> None:
    browser.value(
        f"[...document.querySelectorAll('th button')].find(b => b.textContent.startsWith({json.dumps(title)})).click()"
    )


def choose(browser: Browser, selector: str, value: str, event: str) -> None:
    browser.value(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
        f" e.dispatchEvent(new Event('{event}', {{ bubbles: true }})); }})()"
    )


def test_rows_are_sorted_searched_and_filtered(browser: Browser, site: Path) -> None:
    browser.complaints.clear()
    browser.open(site / TABLE)
    assert names(browser) == [*MODELS, "delta"]
    click(browser, "Worst case")
    assert names(browser)[0] == "delta"
    click(browser, "Worst case")
    assert names(browser) == [*reversed(MODELS), "delta"]
    click(browser, "Model")
    assert names(browser)[1:] == ["alpha", "beta", "delta", "gamma"]
    assert browser.value("document.querySelectorAll('th[aria-sort]').length") == 1
    choose(browser, "input[type=search]", "ALP", "input")
    assert names(browser) == ["alpha"]
    assert browser.value("document.querySelector('.found').textContent") == "1 of 5"
    choose(browser, "input[type=search]", "", "input")
    choose(browser, "[data-place='3']", "nothing", "change")
    assert names(browser) == ["beta"]
    choose(browser, "[data-place='3']", "", "change")
    assert len(names(browser)) == 5
    assert browser.complaints == []


def test_keys_reach_what_the_mouse_does(browser: Browser, site: Path) -> None:
    browser.open(site / TABLE)
    seen = []
    for _ in range(40):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        seen.append(browser.value("document.activeElement.tagName + ' ' + document.activeElement.className"))
    assert seen[0] == "A skip"
    kinds = {name.split()[0] for name in seen}
    assert {"A", "INPUT", "SELECT", "BUTTON", "DIV"} <= kinds


def test_two_models_are_compared(browser: Browser, site: Path) -> None:
    browser.complaints.clear()
    browser.open(site / TABLE.replace(".html", "-compare.html"))
    text = "document.getElementById('main').innerText"
    facts = "[...document.querySelectorAll('#answer dd')].map(d => parseInt(d.textContent))"
    assert browser.value(facts) == [40, 5, 0, 5]
    assert "p = 0.063" in browser.value(text)
    choose(browser, "#second", "3", "change")
    assert browser.value(facts) == [5, 40, 0, 5]
    assert HOSTILE in browser.value(text)
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert "takes them apart, too" in browser.value(text)
    browser.value("document.getElementById('swap').click()")
    assert browser.value(facts) == [5, 0, 40, 5]
    assert "Only alpha is right: 40" in browser.value(text)
    by_class = "[...document.querySelector('#classes tbody').rows].map(r => [...r.cells].map(c => c.innerText))"
    first = browser.value(by_class)[0]
    assert first[:6] == ["0", "5", "100.0", "100.0", "20.0", "100.0"]
    choose(browser, "#first", "1", "change")
    choose(browser, "#second", "2", "change")
    assert browser.value(facts) == [10, 30, 10, 0]
    assert f"p = {binomtest(10, 40).pvalue:.2g}" in browser.value(text)
    choose(browser, "#first", "3", "change")
    choose(browser, "#second", "0", "change")
    # The address keeps the pair.
    fragment = browser.value("location.hash")
    browser.open(site / TABLE.replace(".html", "-compare.html"), fragment)
    assert browser.value(facts) == [5, 0, 40, 5]
    choose(browser, "#first", "4", "change")
    assert "delta: not ranked: without pgd-20" in browser.value(text)
    assert browser.complaints == []


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_its_screen(browser: Browser, site: Path, width: int) -> None:
    browser.complaints.clear()
    browser.resize(width, 800)
    committed = ROOT / "reports" / "leaderboards"
    shown = [
        *site.glob("*.html"),
        *site.glob("models/*.html"),
        *committed.glob("*.html"),
        *committed.glob("models/*.html"),
    ]
    for page in shown:
        browser.open(page)
        assert browser.value("document.documentElement.scrollWidth") <= width, page
        assert page.stat().st_size < 1.5e6, page
    browser.resize(1280, 900)
    assert len(shown) > 10
    assert browser.complaints == []


def test_the_dark_is_dark(browser: Browser, site: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    browser.open(site / TABLE)
    assert browser.value(ground) > 700
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.value(ground) < 100
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
