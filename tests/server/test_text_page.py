"""The page over a memory of text, in a real browser."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
from tests.server.conftest import running
from tests.server.test_page import HOSTILE, Visit, browser, cards, expect, pytestmark
from tests.server.texts import Library, library

__all__ = ["browser", "pytestmark"]  # pytest finds them here


@pytest.fixture
def made() -> Library:
    return library(more=HOSTILE)


@pytest.fixture
def visit(browser: Any, made: Library) -> Iterator[Visit]:
    with running(made.app()) as address:
        visit = Visit(browser, address)
        yield visit
        visit.close()


def ask(visit: Visit, text: str) -> Any:
    """Put a text in, and give the cards."""
    visit.page.get_by_role("radio", name="Text").click()
    visit.page.fill(".inputs textarea", text)
    visit.page.keyboard.press("Control+Enter")
    visit.page.wait_for_selector("#answer .panel .context")
    return cards(visit)


def test_a_text_is_explained_by_tokens_in_their_context(visit: Visit, made: Library) -> None:
    found = ask(visit, "the cat saw a")
    expect(visit.page.locator("#answer .panel .context")).to_contain_text("the cat saw a")
    stream = np.concatenate([[*document, 0] for document in made.documents])
    name = int(found.first.get_attribute("data-id"))
    assert found.first.locator("mark").inner_text().strip() == made.tokenizer.decode([stream[name]]).strip()
    shown = found.first.locator(".context").inner_text()
    assert made.tokenizer.decode(stream[name - 3 : name + 3]).split("\n")[0].strip() in shown


def test_views_that_a_text_has_no_use_for_are_not_there(visit: Visit) -> None:
    cards(visit)
    tabs = [tab.inner_text() for tab in visit.page.get_by_role("tab").all() if tab.is_visible()]
    assert "Map" in " ".join(tabs)
    assert not {"Roses", "Labels", "Reliability"} & set(tabs)


def test_hostile_text_is_shown_as_text(visit: Visit, made: Library) -> None:
    script = sum(len(document) + 1 for document in made.documents[:40])
    cards(visit)
    visit.page.get_by_role("radio", name="A memory").click()
    for place in (script + 20, script + 45, script + 75, script + 100, int(made.memory.ids.max())):
        visit.page.fill("#row", str(place))
        visit.page.keyboard.press("Enter")
        cards(visit)
        assert "\x1b" not in visit.page.inner_text("#answer")
    visit.page.fill("#row", str(script + 20))
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#answer .panel .context")).to_contain_text("<script>")
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_token_is_forgotten(visit: Visit, made: Library) -> None:
    n = len(made.memory)
    found = ask(visit, "the cat saw a")
    name = found.first.get_attribute("data-id")
    found.first.get_by_text("Forget").click()
    visit.page.locator("#confirm").get_by_role("button", name="Forget").click()
    expect(visit.page.locator("#facts")).to_contain_text(f"{n - 1:,} memories")
    expect(visit.page.locator(f'#answer .card[data-id="{name}"]')).to_have_count(0)


def test_a_text_is_asked_and_remembered_by_keyboard_and_mapped(visit: Visit, made: Library) -> None:
    cards(visit)
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("the owl")
    visit.page.keyboard.press("Control+Enter")
    expect(visit.page.locator("#answer .verdict")).to_contain_text("the owl…")
    before, name = visit.page.inner_text("#answer .bars"), cards(visit).first.get_attribute("data-id")
    cards(visit).first.focus()
    visit.page.keyboard.press("x")
    expect(visit.page.locator(f'.card.off[data-id="{name}"]')).to_be_visible()
    assert visit.page.inner_text("#answer .bars") != before
    n = len(made.memory)
    visit.page.fill("[aria-label='How it goes on']", " saw a mouse")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#toast")).to_contain_text("Remembered")
    visit.page.select_option("[aria-label=Order]", "distance")
    expect(cards(visit).first.locator(".label")).to_have_text("saw")
    assert cards(visit).first.get_attribute("data-id") in [str(row) for row in made.memory.ids[n:]]
    visit.page.get_by_role("tab", name="Map").click()
    visit.page.wait_for_selector("canvas[role=img]", timeout=60_000)
