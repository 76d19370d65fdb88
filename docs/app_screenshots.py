# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/app.md: `python docs/app_screenshots.py`. It needs the extra `app`, playwright and Chromium."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import Browser, Page, sync_playwright

from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT, VARPipeline, VARTextToImagePipeline
from hf_var.app import launch_app


ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 120_000  # milliseconds


@contextmanager
def opened(browser: Browser, pipe: Any, title: str, width: int) -> Iterator[Page]:
    """The app of a pipeline in a window."""
    app = launch_app(pipe, title, prevent_thread_lock=True, quiet=True)
    page = browser.new_page(viewport={"width": width, "height": 700})
    page.set_default_timeout(PATIENCE)
    page.goto(app.local_url)
    try:
        yield page
    finally:
        page.close()
        app.close()


def press(page: Page, button: str, shown: str) -> None:
    """Press a button, and wait until the pictures of `shown` have come."""
    page.get_by_role("button", name=button, exact=True).click()
    page.locator(shown).first.wait_for()
    page.wait_for_function("!document.querySelector('.drawn > .wrap:not(.hide)')")
    page.wait_for_timeout(1000)


def draw(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").locator("visible=true").fill(prompt)
    press(page, "Draw", ".scales:visible .gallery-item:nth-child(6)")


def repaint(page: Page, prompt: str) -> None:
    page.get_by_role("button", name="Repaint it").click()
    canvas = page.locator("canvas:visible").first
    canvas.wait_for()
    page.wait_for_timeout(3000)
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.35 * box["height"])
    page.mouse.down()
    for across, down in ((0.75, 0.35), (0.75, 0.45), (0.3, 0.45)):
        page.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"], steps=10)
    page.mouse.up()
    page.get_by_label("Prompt").locator("visible=true").fill(prompt)
    press(page, "Repaint", ".scales:visible .gallery-item:nth-child(6)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    emoji = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    digits = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=ARGUMENTS)
        with opened(browser, emoji, "hf_var: emoji", width=1200) as page:
            draw(page, "a blue apple")
            page.screenshot(path=options.output / "app_draw.png", full_page=True)
            repaint(page, "a green apple")
            page.screenshot(path=options.output / "app_repaint.png", full_page=True)
        with opened(browser, emoji, "hf_var: emoji", width=420) as page:
            draw(page, "a yellow heart")
            page.screenshot(path=options.output / "app_narrow.png", full_page=True)
        with opened(browser, digits, "hf_var: digits", width=1200) as page:
            press(page, "Draw", ".scales:visible .gallery-item:nth-child(5)")
            page.get_by_role("button", name="Score it").click()
            page.locator(".image-frame:visible img").wait_for()
            press(page, "Score", "table:visible")
            page.screenshot(path=options.output / "app_score.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
