# SPDX-License-Identifier: Apache-2.0
"""The page of the app: a tab for each thing that the model can do."""

import html
from functools import partial
from typing import Any

import gradio as gr

from ..pipelines.base import PipelineBase
from .components import INTERNAL
from .demo import Demo
from .tabs import draw_tab, reconstruct_tab, repaint_tab, score_tab, send, vary_tab


CSS = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: auto; }
.grid-wrap.fixed-height { min-height: 0; max-height: none; }
.grid-container { grid-template: none / repeat(var(--grid-cols), minmax(0, 1fr)); }
.scales .caption-label { font-size: 11px; padding: 0 4px; }
.scales .thumbnail-item { height: auto; min-height: 0; aspect-ratio: 1; }
.scales .empty { min-height: 80px; }
.small-pictures img, .small-pictures canvas { image-rendering: pixelated; }
.small-pictures .image-frame img { width: 100%; height: 100%; object-fit: contain; }
"""
# Larger ones are shown smoothly.
MOST_PIXELS_OF_SMALL_PICTURES = 64
# Seconds between two looks for files of pictures, and their age from which on they are deleted.
KEPT_FOR = (3600, 3600)


def build_page(pipe: PipelineBase, title: str) -> gr.Blocks:
    """The page of a pipeline."""
    demo = Demo(pipe)
    height, width = demo.config.image_size
    tabs = {
        "Repaint": (repaint_tab, demo.inpaint_pipe is not None),
        "Vary": (vary_tab, demo.vary_pipe is not None),
        "Score": (score_tab, True),
        "Reconstruct": (reconstruct_tab, True),
    }
    look = "small-pictures" if max(height, width) <= MOST_PIXELS_OF_SMALL_PICTURES else "pictures"
    with (
        gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=KEPT_FOR) as page,
        gr.Column(elem_classes=look),
    ):
        maps = ", ".join(demo.scale_names)
        gr.Markdown(f"# {html.escape(title)}\nPictures of {height} x {width} pixels, of token maps of {maps} codes.")
        with gr.Tabs() as bar:
            with gr.Tab("Draw", id="Draw"):
                pictures, chosen, sending = draw_tab(demo)
            targets = {}
            for name, (make_tab, is_possible) in tabs.items():
                if is_possible:
                    with gr.Tab(name, id=name):
                        targets[name] = make_tab(demo)
        with sending:
            for name, target in targets.items():
                button = gr.Button(f"{name} it", size="sm", min_width=80)
                button.click(partial(send, demo, name), [pictures, chosen], [target, bar], **INTERNAL)
    return page


def launch_page(page: gr.Blocks, **options: Any) -> None:
    """Serve it, see [`launch_app`]."""
    # Nothing is public, nothing is kept, and no second server is started.
    private = {"share": False, "run_history": False, "ssr_mode": False}
    look = {"footer_links": [], "css": CSS, "theme": gr.themes.Soft()}
    # Calls go through the queue, one after the other.
    page.queue(api_open=False)
    page.launch(**{"max_file_size": "20mb", **private, **look, **options})
