"""The page in a real browser: Debian's Chromium, driven by playwright."""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from residual_memory.memory import Memory
from residual_memory.server import create_app
from tests.problems import classification
from tests.server.conftest import TOKEN, Address, running

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = [
    "<script>window.broken = 1</script>",
    '"><img src=x onerror="window.broken = 1">',
    "\x1b[31mred\x1b[0m\x07",
    "\u202egnp.exe\u202c right to left",
    "x" * 4096,
]


class Images:
    """Small images, one a row."""

    def __len__(self) -> int:
        return 300

    def __getitem__(self, row: int) -> tuple[Any, int]:
        image = np.zeros((3, 8, 8), np.float32)
        image[row % 3] = (row % 17) / 16
        return image, row % 5


def hostile_memory(path: Path | None = None) -> Memory:
    """Labels and snippets that would do harm if they were read as anything but text."""
    problem = classification(n=300, q=20, d=8, c=5)
    memory = Memory.create(path, dim=8, n_outputs=5, class_names=HOSTILE)
    memory.append(problem.keys, problem.labels, problem.predictions, snippets=[HOSTILE[row % 5] for row in range(300)])
    return memory


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def address() -> Iterator[Address]:
    with running(create_app(hostile_memory(), token=TOKEN, examples=Images())) as address:
        yield address


class Visit:
    """A page and what went wrong on it."""

    def __init__(self, browser: Any, address: Address, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda line: self.said.append(line.text) if line.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"{address.url}/?token={TOKEN}")
        self.address = address

    def close(self) -> None:
        """Nothing was said on the console, nobody else was asked, and no label was run."""
        assert self.page.evaluate("window.broken") is None
        assert not self.said
        assert not [url for url in self.asked if not url.startswith((self.address.url, "blob:", "data:"))]
        self.page.close()


@pytest.fixture
def visit(browser: Any, address: Address) -> Iterator[Visit]:
    visit = Visit(browser, address)
    yield visit
    visit.close()


def cards(visit: Visit) -> Any:
    visit.page.wait_for_selector("#answer .card")
    return visit.page.locator("#answer .card")


def test_it_opens_on_a_memory_and_leaves_no_token_in_the_address(visit: Visit) -> None:
    assert cards(visit).count() == 24
    assert TOKEN not in visit.page.url
    assert "300 memories" in visit.page.inner_text("#facts")
    assert (
        visit.page.locator("#answer .card img").first.evaluate("image => image.decode().then(() => image.naturalWidth)")
        > 0
    )


def test_hostile_text_is_shown_as_text(visit: Visit) -> None:
    visit.page.fill("#row", "0")
    visit.page.keyboard.press("Enter")
    cards(visit)
    shown = visit.page.inner_text("#answer")
    assert "<script>window.broken = 1</script>" in shown
    assert "\u241b[31m" in shown, "an escape is shown, not obeyed"
    assert "\x1b" not in shown
    assert len(shown) < 40_000, "what is long is cut"
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_memory_is_switched_off_and_on_by_its_button(visit: Visit) -> None:
    first = cards(visit).first
    name, before = first.get_attribute("data-id"), visit.page.inner_text("#answer .bars")
    first.get_by_role("button", name="Off").click()
    visit.page.wait_for_selector(f'.card.off[data-id="{name}"]')
    without = visit.page.inner_text("#answer .bars")
    assert without != before
    visit.page.locator(f'.card.off[data-id="{name}"]').get_by_role("button", name="On").click()
    visit.page.wait_for_selector(".card.off", state="detached")
    assert visit.page.inner_text("#answer .bars") == before


def test_a_memory_is_forgotten_after_a_question_and_the_log_tells(visit: Visit) -> None:
    name = cards(visit).first.get_attribute("data-id")
    cards(visit).first.get_by_text("Forget").click()
    visit.page.get_by_role("button", name="Cancel").click()
    assert "300 memories" in visit.page.inner_text("#facts")
    cards(visit).first.get_by_text("Forget").click()
    visit.page.locator("#confirm").get_by_role("button", name="Forget").click()
    expect(visit.page.locator("#facts")).to_contain_text("299 memories")
    expect(visit.page.locator(f'#answer .card[data-id="{name}"]')).to_have_count(0)
    visit.page.get_by_role("tab", name="Log").click()
    visit.page.wait_for_selector("#view-log td")
    assert "forgot" in visit.page.inner_text("#view-log tbody tr:first-child")


def test_what_is_pasted_is_explained_and_remembered(visit: Visit) -> None:
    cards(visit)
    visit.page.get_by_role("radio", name="Numbers").click()
    visit.page.fill(".inputs textarea", '{"keys": [[0,0,0,0,0,0,0,1]], "predictions": [[0.2,0.2,0.2,0.2,0.2]]}')
    visit.page.keyboard.press("Control+Enter")
    visit.page.wait_for_selector("[aria-label='True label']")
    before = visit.page.inner_text("#answer .bars")
    visit.page.fill("[aria-label='True label']", HOSTILE[3])
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#facts")).to_contain_text("301 memories")
    visit.page.wait_for_selector('#answer .card[data-id="300"]')
    assert visit.page.inner_text("#answer .bars") != before


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"keys": [[1]], "predictions": [[1]]}', '{"a": "b"}'])
def test_what_cannot_be_read_is_said_in_words(visit: Visit, text: str) -> None:
    cards(visit)
    visit.page.get_by_role("radio", name="Numbers").click()
    visit.page.fill(".inputs textarea", text)
    visit.page.keyboard.press("Control+Enter")
    visit.page.wait_for_selector("#answer .error")
    assert len(visit.page.inner_text("#answer .error")) > 20
    visit.said[:] = [line for line in visit.said if "status of 422" not in line]


def test_the_keyboard_does_all_of_it(visit: Visit) -> None:
    cards(visit)
    visit.page.keyboard.press("/")
    assert visit.page.evaluate("document.activeElement.id") == "row"
    visit.page.keyboard.type("5")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#answer .verdict")).to_contain_text("asked without itself")
    first, second = (cards(visit).nth(place).get_attribute("data-id") for place in (0, 1))
    visit.page.locator("#answer .card").first.focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.evaluate("document.activeElement.dataset.id") == second
    visit.page.keyboard.press("x")
    visit.page.wait_for_selector(f'.card.off[data-id="{second}"]')
    visit.page.locator(f'#answer .card[data-id="{first}"]').focus()
    visit.page.keyboard.press("f")
    visit.page.wait_for_selector("#confirm[open]")
    visit.page.keyboard.press("Escape")
    visit.page.locator(f'#answer .card[data-id="{first}"]').focus()
    visit.page.keyboard.press("e")
    expect(visit.page.locator("#row")).to_have_value(str(first))
    visit.page.locator("body").press("3")
    assert visit.page.get_by_role("tab", name="Roses").get_attribute("aria-selected") == "true"
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.get_by_role("tab", name="Labels").get_attribute("aria-selected") == "true"
    visit.page.keyboard.press("?")
    assert visit.page.locator("#help").is_visible()
    visit.page.keyboard.press("Escape")
    theme = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    visit.page.keyboard.press("t")
    assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") != theme


def test_the_map_is_clicked_and_lassoed(visit: Visit) -> None:
    cards(visit)
    visit.page.get_by_role("tab", name="Map").click()
    visit.page.wait_for_selector("canvas[role=img]", timeout=60_000)
    box = visit.page.locator("canvas[role=img]").bounding_box()
    assert box is not None
    for kind in ("label", "residual", "gain"):
        visit.page.select_option("[aria-label=Colour]", kind)
    x, y, r = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, min(box["width"], box["height"]) / 2.1
    visit.page.get_by_role("button", name="Lasso").click()
    visit.page.mouse.move(x + r, y)
    visit.page.mouse.down()
    for turn in np.linspace(0, 2 * np.pi, 24):
        visit.page.mouse.move(x + r * np.cos(turn), y + r * np.sin(turn))
    visit.page.mouse.up()
    visit.page.wait_for_selector(".side .card")
    found = re.match(r"([\d,]+) memories", visit.page.inner_text(".side h2"))
    assert found is not None
    assert int(found[1].replace(",", "")) > 150
    visit.page.locator("canvas[role=img]").focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#view-explain:not([hidden]) #answer .card")


def test_roses_labels_and_reliability_are_there(visit: Visit) -> None:
    cards(visit)
    for name, selector in (("Roses", ".rose"), ("Labels", "td"), ("Reliability", "svg circle")):
        visit.page.get_by_role("tab", name=name).click()
        visit.page.wait_for_selector(f"#view-{name.lower()} {selector}", timeout=60_000)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_at_360_pixels(browser: Any, address: Address, scheme: str) -> None:
    visit = Visit(browser, address, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    cards(visit)
    for name in ("explain", "map", "roses", "labels", "reliability", "log"):
        visit.page.locator(f"#tab-{name}").click()
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360, name
    visit.close()


def test_an_empty_memory_says_so(browser: Any) -> None:
    memory = Memory.create(dim=8, n_outputs=5)
    with running(create_app(memory, token=TOKEN)) as address:
        visit = Visit(browser, address)
        visit.page.wait_for_selector("#answer .empty")
        visit.page.get_by_role("tab", name="Map").click()
        visit.page.wait_for_selector("#view-map .empty")
        visit.close()


def test_a_server_that_stops_is_said_in_words(browser: Any) -> None:
    with running(create_app(hostile_memory(), token=TOKEN)) as address:
        visit = Visit(browser, address)
        cards(visit)
    visit.page.fill("#row", "3")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#answer .error")
    assert "does not answer" in visit.page.inner_text("#answer .error")
    visit.page.close()


def test_an_image_is_uploaded_explained_and_remembered(browser: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from residual_memory.models.torch import build_memory

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5))
    images, labels = zip(*(Images()[row] for row in range(300)), strict=True)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(np.stack(images)), torch.tensor(labels))
    memory = build_memory(network, dataset, None, verbose=False)
    picture = io.BytesIO()
    Image.new("RGB", (20, 30), (200, 40, 40)).save(picture, "PNG")
    with running(create_app(memory, network, token=TOKEN, examples=Images())) as address:
        visit = Visit(browser, address)
        cards(visit)
        visit.page.get_by_role("radio", name="An image").click()
        image = {"name": "red.png", "mimeType": "image/png", "buffer": picture.getvalue()}
        visit.page.set_input_files(".inputs input[type=file]", image)
        expect(visit.page.get_by_alt_text("the image that was asked about")).to_be_visible()
        before = visit.page.inner_text("#answer .bars")
        visit.page.fill("[aria-label='True label']", "3")
        visit.page.get_by_role("button", name="Add", exact=True).click()
        expect(visit.page.locator("#facts")).to_contain_text("301 memories")
        visit.page.select_option("[aria-label=Order]", "distance")
        expect(visit.page.locator('#answer .card[data-id="300"]')).to_be_visible()
        assert visit.page.inner_text("#answer .bars") != before
        visit.page.set_input_files(".inputs input[type=file]", {**image, "buffer": b"no picture"})
        expect(visit.page.locator("#answer .error")).to_contain_text("no image that can be read")
        visit.said[:] = [line for line in visit.said if "status of 422" not in line]
        visit.close()
