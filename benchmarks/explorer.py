"""The page in a real browser: how soon it is there, 200,000 points on its map, and the pictures of the documentation.

    python -m benchmarks explorer

Needs Chromium, the memory that `make demo` makes, and for the text `python -m experiments.language.train --tokens
2000000`; what is missing is said and left out. A run without Chromium's own sandbox, as root needs it.
"""

import contextlib
import io
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from transformers import PreTrainedTokenizerFast

import residual_memory as rm
from experiments.language.corpus import tokenizer_of, tokens_of
from experiments.language.table import windows
from experiments.language.train import Training
from experiments.results_file import stamped
from residual_memory.demo import served
from residual_memory.demo.cifar100 import user_cache
from residual_memory.memory import Memory
from residual_memory.server import create_app
from residual_memory.server.running import configured, listening

RESULTS = Path(__file__).parent / "results" / "explorer.json"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
TOKEN = "a-token-of-the-benchmark"
POINTS, CLASSES, DIM = 200_000, 40, 32
TEXT = Training(tokens=2_000_000)
REMEMBERED, HELD_OUT = 250_000, 40_000  # tokens
ROSE = "30514"  # a rose that the network takes for a poppy
SAID = "Margot Boer of the Netherlands came second. Lee Sang-hwa of South"
LOADS = 5
HEIGHTS = {1280: 860, 360: 740}
SHOWN = {  # views of the images, by width and scheme
    (1280, "light"): ("explain", "roses", "reliability"),
    (1280, "dark"): ("explain", "map", "labels"),
    (360, "light"): ("explain", "roses"),
    (360, "dark"): ("explain", "map"),
}
FLAGS = ["--no-sandbox", "--disable-gpu"]
GOAL_PAINT, GOAL_FRAME = 1.0, 0.1
DRAG = """() => new Promise(done => {
  const canvas = document.querySelector("#view-map canvas[role=img]"), box = canvas.getBoundingClientRect();
  const send = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type, {pointerId: 1, clientX: x, clientY: y}));
  canvas.setPointerCapture = () => {};
  const frames = [];
  let last = performance.now(), n = 0;
  send("pointerdown", box.x + 300, box.y + 300);
  const step = () => {
    const now = performance.now();
    frames.push(now - last);
    last = now;
    send("pointermove", box.x + 300 + 2 * ++n, box.y + 300 + n);
    if (n < 120) return requestAnimationFrame(step);
    send("pointerup", box.x + 540, box.y + 420);
    done(frames.slice(1).map(ms => ms / 1000));
  };
  requestAnimationFrame(step);
})"""

Row = dict[str, Any]


def run() -> None:
    """Measure, take the pictures, write the result file and print it."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        folder = Path(name)
        with running(made_up()) as address:
            rows += [painted(browser, address, f"{POINTS:,} memories"), moved(browser, address)]
        if images := images_app(folder):
            with running(images) as address:
                rows.append(painted(browser, address, "CIFAR-100"))
                pictured(browser, address, "explorer", SHOWN, row=ROSE)
                rows.append(driven(browser, address, "CIFAR-100", with_image))
        if text := text_app(folder):
            with running(text) as address:
                rows.append(painted(browser, address, "text"))
                pictured(browser, address, "explorer-text", dict.fromkeys(SHOWN, ("explain",)), text=SAID)
                rows.append(driven(browser, address, "text", with_text))
        browser.close()
    head = stamped("explorer", "python -m benchmarks explorer", "CIFAR-100, enwiki text, made-up keys")
    RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(f"{row['setting']}: {row['ours']:.3f} {row['unit']} (goal {row['theirs']:g})")


# ---------------------------------------------------------------------- what is served


def made_up() -> Any:
    """Clusters of as many rows as the map shows."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, POINTS)
    keys = 2 * random.normal(size=(CLASSES, DIM))[labels] + random.normal(size=(POINTS, DIM))
    memory = Memory.create(dim=DIM, n_outputs=CLASSES, class_names=[f"class {place}" for place in range(CLASSES)])
    memory.append(keys.astype(np.float32), labels, random.dirichlet(np.full(CLASSES, 0.3), POINTS).astype(np.float32))
    return create_app(memory, token=TOKEN)


def images_app(folder: Path) -> Any:
    """CIFAR-100, on a copy of the memory of the demo; None without it."""
    found = next((user_cache() / "demo").glob("resnet8-stage3-4x4-*"), None)
    if found is None:
        print("the images are left out: make demo makes their memory")
        return None
    with Memory.open(found) as original:
        memory = original.copy(folder / "cifar-100")
    return create_app(memory, served.network(), token=TOKEN, examples=served.images())


def text_app(folder: Path) -> Any:
    """A decoder-only T5 with a memory of the text that it was trained on; None without its weights."""
    if not TEXT.weights().exists():
        print(f"the text is left out: python -m experiments.language.train --tokens {TEXT.tokens} makes the network")
        return None
    network = TEXT.load()
    known = tokens_of(TEXT.corpus, TEXT.split, TEXT.vocabulary, limit=TEXT.tokens).first(REMEMBERED)
    held_out = tokens_of(TEXT.corpus, "valid", TEXT.vocabulary).first(HELD_OUT)
    memory = rm.build_memory(network, windows(known), folder / "wikipedia", autocast=torch.bfloat16)
    memory.save_setting(rm.tune_language(rm.ResMemForCausalLM(network, memory), windows(held_out)).best.to_dict())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(TEXT.vocabulary))  # documents have their ends
    documents = np.split(known.numbers, known.starts[1:])
    return create_app(memory, network, token=TOKEN, tokenizer=tokenizer, text=documents)


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The application on a port of its own; gives its address."""
    waiting = listening("127.0.0.1", 0)
    server = uvicorn.Server(configured(app, app.state.limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [waiting]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{waiting.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    waiting.close()


# ---------------------------------------------------------------------- what is measured


@contextlib.contextmanager
def visited(browser: Browser, address: str, **options: Any) -> Iterator[Page]:
    """The page, which says nothing on the console and asks nobody else."""
    context = browser.new_context(**options)
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda line: faults.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "blob:")) else faults.append(asked.url))
    page.goto(f"{address}/?token={TOKEN}")
    page.wait_for_selector("#answer .panel", timeout=60_000)
    yield page
    context.close()
    if faults:
        raise RuntimeError(f"the page at {address} has faults: {faults}")


def painted(browser: Browser, address: str, what: str) -> Row:
    """Seconds until the first paint, and until an answer is there."""
    paints, answers = [], []
    for _ in range(LOADS):
        with visited(browser, address) as page:
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
            answers.append(page.evaluate("performance.now()") / 1000)
    return {
        "setting": f"first paint, {what}",
        "ratio": statistics.median(paints) / GOAL_PAINT,
        "against": "the goal",
        "ours": statistics.median(paints),
        "theirs": GOAL_PAINT,
        "unit": "seconds",
        "first_answer_seconds": statistics.median(answers),
        "loads": LOADS,
    }


def moved(browser: Browser, address: str) -> Row:
    """Frames while the whole map is dragged."""
    with visited(browser, address, viewport={"width": 1280, "height": 860}) as page:
        open_view(page, "map")
        laid_out = page.evaluate("performance.now()") / 1000
        frames = page.evaluate(DRAG)
    return {
        "setting": f"a map of {POINTS:,} memories, dragged",
        "ratio": statistics.median(frames) / GOAL_FRAME,
        "against": "the goal",
        "ours": statistics.median(frames),
        "theirs": GOAL_FRAME,
        "unit": "seconds a frame",
        "slowest_of_20": statistics.quantiles(frames, n=20)[-1],
        "laid_out_seconds": laid_out,
    }


def driven(browser: Browser, address: str, what: str, remember: Callable[[Page], None]) -> Row:
    """What the page can do, by keyboard and mouse; `visited` raises if it says or asks what it should not."""
    began = time.monotonic()
    with visited(browser, address, viewport={"width": 1280, "height": 860}) as page:
        page.get_by_role("radio", name="A memory").click()
        page.fill("#row", "5")
        page.keyboard.press("Enter")
        expect(page.locator("#answer .verdict")).to_contain_text("asked without itself")
        first = page.locator("#answer .card").first
        name = first.get_attribute("data-id")
        card = page.locator(f'#answer .card[data-id="{name}"]')
        first.focus()
        page.keyboard.press("x")
        expect(page.locator(f'.card.off[data-id="{name}"]')).to_be_visible()
        card.focus()
        page.keyboard.press("x")
        expect(page.locator(".card.off")).to_have_count(0)
        card.focus()
        page.keyboard.press("f")
        page.locator("#confirm").get_by_role("button", name="Forget").click()
        expect(page.locator("#toast")).to_contain_text("Forgotten")
        expect(card).to_have_count(0)
        page.locator("#answer .card").first.focus()
        page.keyboard.press("e")
        expect(page.locator("#row")).not_to_have_value("5")
        remember(page)
        expect(page.locator("#toast")).to_contain_text("Remembered")
        open_view(page, "map")
        box = page.locator("#view-map canvas[role=img]").bounding_box()
        assert box is not None
        page.get_by_role("button", name="Lasso").click()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x + 100, y)
        page.mouse.down()
        for turn in np.linspace(0, 2 * np.pi, 24):
            page.mouse.move(x + 100 * np.cos(turn), y + 100 * np.sin(turn))
        page.mouse.up()
        expect(page.locator(".side h2")).to_contain_text("memories")
    return {
        "setting": f"driven, {what}",
        "ratio": 0.0,
        "against": "none allowed",
        "ours": 0,
        "theirs": 0,
        "unit": "messages on the console and requests off the host",
        "acts": ["ask by id", "off and on", "forget", "explain another", "add", "map", "lasso"],
        "seconds": time.monotonic() - began,
    }


def with_image(page: Page) -> None:
    """Upload an image, and remember it under a label."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), (190, 30, 60)).save(picture, "PNG")
    page.get_by_role("radio", name="An image").click()
    image: Any = {"name": "red.png", "mimeType": "image/png", "buffer": picture.getvalue()}
    page.set_input_files(".inputs input[type=file]", files=[image])
    page.fill("[aria-label='True label']", "sweet_pepper")
    page.keyboard.press("Enter")


def with_text(page: Page) -> None:
    """Ask about a text, and remember how it goes on."""
    page.get_by_role("radio", name="Text").click()
    page.fill(".inputs textarea", SAID)
    page.keyboard.press("Control+Enter")
    page.fill("[aria-label='How it goes on']", " Korea won the race")
    page.keyboard.press("Enter")


def open_view(page: Page, name: str) -> None:
    """A view, when what it shows is worked out."""
    page.click(f"#tab-{name}")
    if name == "map":
        page.wait_for_selector("#view-map canvas[role=img]", timeout=600_000)
    page.wait_for_selector(f"#view-{name} .loading", state="detached", timeout=600_000)
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)


def pictured(
    browser: Browser,
    address: str,
    name: str,
    shown: Mapping[tuple[int, str], Sequence[str]],
    *,
    row: str = "",
    text: str = "",
) -> None:
    """Pictures of views by width and scheme, after a question about a row or a text."""
    for (width, scheme), views in shown.items():
        size = {"width": width, "height": HEIGHTS[width]}
        with visited(browser, address, viewport=size, color_scheme=scheme) as page:
            page.fill(".inputs input, .inputs textarea", row or text)
            page.keyboard.press("Enter" if row else "Control+Enter")
            page.wait_for_timeout(1000)
            page.evaluate("document.activeElement.blur()")
            for view in views:
                open_view(page, view)
                saved(page.screenshot(), PICTURES / f"{name}-{view}-{width}-{scheme}.webp")


def saved(picture: bytes, path: Path) -> None:
    """A picture as WebP, at a fifth of the bytes of a PNG."""
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").save(path, quality=90, method=6)
