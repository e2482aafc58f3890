"""A report in a real browser: it asks for nothing, complains of nothing, and fits a phone."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from tests.reports.test_reports import HOSTILE, SETTING, Images, memory_of, problem

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_report_of_hostile_names_is_text_on_every_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    named = [(name, name) for name in HOSTILE]
    rm.make_report(
        memory_of(), **problem(200, HOSTILE, 2), setting=SETTING, title=HOSTILE[3], facts=named, held_out=Images()
    ).write(path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        papers = [look(browser, path, width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
        browser.close()
    assert papers[0] == papers[2] != papers[1] == papers[3], "dark pages are dark"


def look(browser: Any, path: Path, width: int, scheme: str) -> str:
    """Open the page; the colour that it is written on."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda what: said.append(str(what)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    sizes = page.evaluate("[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)")
    assert len(sizes) == 5
    assert np.all(np.array(sizes) > 250)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    return paper
