"""The report as people meet it: in a browser, on a phone, by keyboard, in the dark, on paper."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.report import report
from experiments.report.page.pictures import _THEMES
from experiments.train.runs import find_runs
from tests.experiments.fake_runs import fake_run, fake_sweep
from tests.support import ROOT

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


def busy_sweep(root: Path) -> Path:
    """Everything that makes a page wide or odd: two optimizers, other rates, mishaps."""
    for optimizer in ("sgd", "adamw"):
        fake_sweep(root, seeds=3, optimizer=optimizer)
    for rate in (1e-5, 1e-3, 1.0):
        fake_run(root, "geometric/fixed", 0, 0.5, rate=rate)
        fake_run(root, "geometric/repair", 0, 0.9, rate=rate)
    fake_run(root, "flat/fixed", 7, status="failed", traceback="Traceback\n  in " + "x" * 300)
    fake_run(root, "flat/fixed", 8, status="diverged", accuracy=0.1)
    return root


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = busy_sweep(tmp_path_factory.mktemp("busy") / "runs")
    target = root.parent / "report.html"
    report.write_report([root], target)
    return target


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path or in CHROMIUM")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """Open the page; complain afterwards of errors and of requests to anywhere."""
    pages, said, asked = [], [], []

    def open_page(**options: Any) -> Any:
        page = browser.new_page(**options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_of_the_page(opened: Any, width: int, scheme: str) -> None:
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for part in page.query_selector_all("details"):
        part.evaluate("part => { part.open = true; }")
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 27, 34)")
    shown = page.evaluate("[...document.images].map(image => image.currentSrc)")
    other = page.evaluate(
        "[...document.querySelectorAll('picture source')].map(source => source.srcset)"
    )
    assert [a == b for a, b in zip(shown, other, strict=True)] == [scheme == "dark"] * len(shown)
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def column(page: Any, name: str) -> list[str]:
    return page.evaluate(
        """name => {
            const heads = [...document.querySelectorAll('#runs thead th')];
            const at = heads.findIndex(head => head.textContent === name);
            return [...document.querySelectorAll('#runs tbody tr')].map(
                row => row.cells[at].textContent);
        }""",
        name,
    )


@pytest.mark.parametrize("how", ["click", "Enter", "Space"])
def test_the_table_sorts_both_ways(opened: Any, how: str) -> None:
    page = opened()
    button = page.get_by_role("button", name="accuracy", exact=True)
    unknown = column(page, "accuracy").count("–")
    assert unknown
    for direction in ("ascending", "descending"):
        if how == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press(how)
        values = column(page, "accuracy")
        known = [float(v) for v in values if v != "–"]
        assert values[-unknown:] == ["–"] * unknown
        assert known == sorted(known, reverse=direction == "descending")
        sorted_by = page.eval_on_selector_all(
            "#runs th[aria-sort]", "heads => heads.map(h => [h.textContent, h.ariaSort])"
        )
        assert sorted_by == [["accuracy", direction]]
        assert page.inner_text("#sorted") == f"Sorted by accuracy, {direction}."


def test_a_decision_is_found_by_pointer_and_by_key(opened: Any) -> None:
    page = opened()
    mark = page.query_selector("#rates ~ .grid a")
    title = mark.query_selector("title").text_content()
    assert re.match(r"step \d+, \w+: raise; displacement", title)
    assert mark.get_attribute("aria-label") == title
    mark.focus()
    page.keyboard.press("Enter")
    row = page.query_selector("tr:target")
    step, stage = re.match(r"step (\d+), (\w+)", title).groups()
    assert row.inner_text().split()[:2] == [step, stage]


def test_links_lead_somewhere_and_ids_are_unique(opened: Any) -> None:
    page = opened()
    links = page.eval_on_selector_all(
        "a[href^='#']", "all => all.map(a => a.getAttribute('href').slice(1))"
    )
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    assert len(links) > 20


def test_everything_has_a_name_for_a_screen_reader(opened: Any) -> None:
    page = opened()
    for selector in ("svg[role]", "figure svg:not([aria-hidden])", "[role=region]", "svg a"):
        labels = page.eval_on_selector_all(selector, "all => all.map(e => e.ariaLabel)")
        assert labels
        assert all(labels), selector
    assert all(page.eval_on_selector_all("img", "all => all.map(i => i.alt)"))
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_on_paper_everything_is_light_open_and_inside(opened: Any, tmp_path: Path) -> None:
    page = opened(color_scheme="dark", viewport={"width": 720, "height": 1000})
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.eval_on_selector_all("details", "all => all.every(part => part.open)")
    page.pdf(path=tmp_path / "r.pdf", format="A4")
    assert (tmp_path / "r.pdf").stat().st_size > 10_000


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_letters_stand_out_from_the_paper() -> None:
    style = (ROOT / "experiments" / "report" / "page" / "templates" / "style.css").read_text(
        encoding="utf-8"
    )
    themes = re.findall(r":root \{([^}]*)\}", style)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", theme))
        for letters in ("ink", "quiet", "accent", "bad"):
            for paper in ("paper", "card"):
                assert contrast(colours[letters], colours[paper]) >= 4.5, (letters, paper)
    for theme in _THEMES.values():
        assert contrast(str(theme["ink"]), str(theme["paper"])) >= 4.5


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    runs = fake_sweep(tmp_path / "runs", seeds=2)
    pages = []
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.html"
        subprocess.run(
            [sys.executable, "-m", "experiments.report", str(runs), "--output", str(target)],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        pages.append(target.read_bytes())
    assert pages[0] == pages[1]


def test_many_runs_make_a_page_of_bounded_size(tmp_path: Path) -> None:
    """Four optimizers in full and a row for each of 1,000 runs stay below 3 MB."""
    first = fake_sweep(tmp_path / "runs", seeds=2)
    one = len(report.render(find_runs([first])).encode())
    fake_sweep(first, seeds=2, optimizer="adamw")
    two = len(report.render(find_runs([first])).encode())
    fake_run(first, "flat/fixed", 50)
    three = len(report.render(find_runs([first])).encode())
    assert one + 3 * (two - one) + 992 * (three - two) < 3_000_000
