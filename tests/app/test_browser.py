# SPDX-License-Identifier: Apache-2.0
"""The app in a real browser: somebody types, clicks, paints a mask and sees pictures."""

import io
import shutil
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT, VARPipeline, VARTextToImagePipeline
from pipelines.tiny import seeded


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

from app.serving import served  # noqa: E402


ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# The pictures that the gallery showed, in their order.
RECORD = """() => {
    window.shown = [];
    new MutationObserver(() => document.querySelectorAll(".drawn .thumbnail-item img").forEach((image) => {
        if (!window.shown.includes(image.src)) window.shown.push(image.src);
    })).observe(document.body, {subtree: true, childList: true, attributes: true});
}"""
IDLE = "() => !document.querySelector('.drawn > .wrap:not(.hide)')"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def emoji():
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def emoji_address(emoji):
    with served(emoji) as app:
        yield app.local_url


@pytest.fixture
def hosts():
    """Of all addresses that the browser asked for."""
    return set()


@pytest.fixture
def window(browser, hosts):
    """Opens the app in a window of its own."""
    pages = []

    def make(address, width=1200):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.set_default_timeout(100_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(address)
        page.get_by_role("button", name="Draw", exact=True).wait_for()
        return page

    yield make
    for page in pages:
        page.close()


def visible(page, label):
    return page.get_by_label(label, exact=True).locator("visible=true").last


def pictures(page, number, scales):
    """The pictures of the tab that is open, once there are as many of them and of those after each scale."""
    page.locator(f".scales:visible .gallery-item:nth-child({scales})").wait_for()
    page.wait_for_function(IDLE)
    found = page.locator(".drawn:visible .thumbnail-item img")
    assert found.count() == number
    found.last.evaluate("image => image.decode()")
    return [as_array(page, found.nth(place).get_attribute("src")) for place in range(number)]


def as_array(page, address):
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())))


def colour_in_the_middle(canvas):
    image = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))
    return image[image.shape[0] // 2, image.shape[1] // 2]


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for too long")


def test_draw_paint_and_repaint(emoji, emoji_address, window, hosts):
    page = window(emoji_address)
    page.evaluate(RECORD)
    visible(page, "Prompt").fill("a green car")
    visible(page, "number input for Pictures").fill("1")
    visible(page, "Seed").fill("7")
    page.get_by_role("button", name="Draw", exact=True).click()
    (before,) = pictures(page, 1, 6)
    assert page.locator(".drawn:visible .thumbnail-item img").evaluate("image => image.naturalWidth") == 32
    assert np.array_equal(before, np.asarray(emoji("a green car", generator=seeded(7)).images[0]))
    # It grew: there were other pictures before it.
    assert len(page.evaluate("window.shown")) > 1

    page.get_by_role("button", name="Repaint it").click()
    canvas = page.locator("canvas:visible").first
    canvas.wait_for()
    wait_for(lambda: (colour_in_the_middle(canvas) < 250).any())
    box = canvas.bounding_box()
    middle, height = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle - 100, height)
    page.mouse.down()
    page.mouse.move(middle + 100, height, steps=8)
    page.mouse.up()
    wait_for(lambda: np.array_equal(colour_in_the_middle(canvas), (255, 45, 149)))
    visible(page, "Prompt").fill("a red car")
    visible(page, "number input for Pictures").fill("2")
    page.get_by_role("button", name="Repaint", exact=True).click()
    edited = pictures(page, 2, 6)
    changed = np.stack([(after != before).any(axis=-1) for after in edited]).any(axis=0)
    rows, columns = np.nonzero(changed)
    # A stroke from the left to the right, about 4 of 32 pixels wide, in the middle.
    assert columns.max() - columns.min() >= 4
    assert rows.min() >= 10
    assert rows.max() <= 21
    assert not np.array_equal(*edited)
    # `None` is that of blobs and data, which are the page's own.
    assert hosts - {None} == {"127.0.0.1"}


def test_two_windows_with_a_mistake_in_one(emoji, emoji_address, window):
    one, other = window(emoji_address), window(emoji_address, width=390)
    for page, prompt, seed in ((one, "a red heart", 1), (other, "a blue heart", 2)):
        visible(page, "Prompt").fill(prompt)
        visible(page, "Seed").fill(str(seed))
    for page in (one, other):
        page.get_by_role("button", name="Draw", exact=True).click()
    for page, prompt, seed in ((one, "a red heart", 1), (other, "a blue heart", 2)):
        expected = emoji(prompt, num_images_per_prompt=4, generator=seeded(seed)).images
        assert all(np.array_equal(*pair) for pair in zip(pictures(page, 4, 6), map(np.asarray, expected), strict=True))
    # Nothing sticks out of a narrow window.
    assert other.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    visible(one, "Prompt").fill("")
    one.get_by_role("button", name="Draw", exact=True).click()
    one.get_by_text("The prompt must be a text, got ''.").wait_for()


def upload(page, path):
    page.get_by_role("tabpanel").locator("visible=true").locator("input[type=file]").set_input_files(path)


def test_uploads(window, tmp_path):
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipe(3, generator=seeded(0)).images[0].save(tmp_path / "three.png")
    (tmp_path / "notes.png").write_text("no picture")
    with served(pipe) as app:
        page = window(app.local_url)
        page.get_by_role("tab", name="Score").click()
        upload(page, tmp_path / "three.png")
        page.locator(".image-frame:visible img").wait_for()
        page.get_by_role("button", name="Score", exact=True).click()
        page.locator("table:visible").wait_for()
        assert page.locator("[data-testid='label-output-value']:visible").inner_text().strip() == "3"
        page.get_by_role("tab", name="Reconstruct").click()
        upload(page, tmp_path / "notes.png")
        page.locator(".image-frame:visible img").wait_for(state="attached")
        page.get_by_role("button", name="Reconstruct", exact=True).click()
        page.get_by_text("The picture cannot be read: notes.png").wait_for()
