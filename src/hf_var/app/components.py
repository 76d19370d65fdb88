# SPDX-License-Identifier: Apache-2.0
"""Gradio's components with the settings that the app needs, and what its handlers share."""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from PIL import Image

from .demo import MAX_PICTURES, Demo


PROMPTS = [
    "a red heart",
    "a purple heart",
    "smiling face with sunglasses",
    "a purple cat face",
    "a green book",
    "a blue apple",
]
BRUSH = "#ff2d95"
# A handler that belongs to the page, not to the programming interface.
INTERNAL: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@contextmanager
def answering() -> Iterator[Callable[[Image.Image, object], str]]:
    """
    What a handler works in. It gives a function that saves a picture under a name, for the time until the handler goes on:
    Gradio copies such files whole, while pictures themselves are written over files that a browser may be reading. What
    is wrong with the inputs is shown to the user.
    """
    with TemporaryDirectory(prefix="hf_var_") as folder:

        def save(picture: Image.Image, name: object) -> str:
            path = Path(folder, f"{name}.png")
            picture.save(path)
            return str(path)

        try:
            yield save
        except ValueError as error:
            # Gradio reads the text as HTML, which may hold what a user typed.
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error


def on_press(button: gr.Button, run: Callable, inputs: list, outputs: list) -> None:
    """Let a button use the model, and so the Enter key where a prompt is among the inputs."""
    triggers = [button.click, *(entry.submit for entry in inputs if isinstance(entry, gr.Textbox))]
    # One call after the other, whoever asks: they share the processor.
    queue: Any = {"concurrency_limit": 1, "concurrency_id": "model"}
    gr.on(triggers, run, inputs, outputs, api_name=button.value.lower(), show_progress="minimal", **queue)


def condition_input(demo: Demo) -> Any:
    """What is drawn: a prompt, a class, or nothing in particular."""
    if demo.reads_texts:
        return gr.Textbox(PROMPTS[0], label="Prompt", lines=1, max_length=1000)
    if not demo.class_names:
        return gr.State(None)
    choices: list[Any] = [(name, key) for key, name in demo.class_names.items()]
    if demo.knows_unconditional:
        choices.append(("no class", -1))
    return as_given(gr.Dropdown(choices, value=choices[0][1], label="Class"))


def scored_input(demo: Demo) -> Any:
    """What a picture is scored as: a class, or prompts to choose from."""
    if not demo.reads_texts:
        return condition_input(demo)
    info = "one in a line: the first is scored, and all are compared"
    return gr.Textbox("\n".join(PROMPTS), label="Prompts", info=info, lines=len(PROMPTS), max_length=5000)


def sampling_inputs(demo: Demo, has_examples: bool = False) -> list[Any]:
    """Condition, guidance scale, number of pictures and seed."""
    condition = condition_input(demo)
    if has_examples and demo.reads_texts:
        gr.Examples(PROMPTS, condition, label="For example")  # pyright: ignore[reportArgumentType]
    is_guided = demo.knows_unconditional
    default = demo.pipe.config.guidance_scale if is_guided else 1.0
    guidance = slider(1, max(10, default), default, 0.1, "Guidance scale", info="1 is off", visible=is_guided)
    with gr.Row():
        number = slider(1, MAX_PICTURES, 4, 1, "Pictures", min_width=150)
        seed = gr.Number(0, label="Seed", min_width=150)
    return [condition, guidance, number, seed]


def slider(least: float, most: float, value: float, step: float, label: str, **settings: Any) -> gr.Slider:
    """A slider without Gradio's own check."""
    return as_given(gr.Slider(least, most, value, step=step, label=label, **settings))


def as_given(component: Any) -> Any:
    """Let a component hand over its value as it comes: what is wrong with it is said where it is used."""
    component.preprocess = lambda payload: payload
    return component


def gallery(columns: int, **settings: Any) -> gr.Gallery:
    """Pictures to look at, in the files' own pixels."""
    return gr.Gallery(
        columns=columns, object_fit="contain", format="png", show_label=False, interactive=False, **settings
    )


def picture_outputs(demo: Demo) -> list[Any]:
    """Pictures, and the first one after each scale."""
    num_scales = len(demo.scale_names)
    pictures = gallery(2, elem_classes="drawn")
    gr.Markdown("The first picture after each scale, coarse to fine, with the size of the scale's token map:")
    scales = gallery(
        num_scales if num_scales <= 6 else 5, allow_preview=False, fit_columns=False, elem_classes="scales"
    )
    return [pictures, scales]


def picture_input() -> gr.Image:
    """A picture to upload, of which a handler gets the path: the package has a decoder of its own."""
    gr.Markdown("Upload a picture, or send one here that was drawn:")
    picture = gr.Image(type="filepath", sources=["upload", "clipboard"], format="png", show_label=False, height=280)
    picture.preprocess = lambda payload: None if payload is None else payload.path  # pyright: ignore
    return picture


def canvas() -> gr.ImageEditor:
    """A picture with a layer for a mask."""
    gr.Markdown(
        "Upload a picture, or send one here that was drawn. Then paint over the part that shall be drawn anew:"
    )
    brush = gr.Brush(default_size=48, colors=[BRUSH], color_mode="fixed")
    editor = gr.ImageEditor(
        type="pil",
        format="png",
        image_mode="RGBA",
        show_label=False,
        sources=["upload", "clipboard"],
        transforms=(),
        layers=False,
        brush=brush,
        eraser=gr.Eraser(default_size=48),
        height=500,
    )
    read = editor.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        # Damaged files make Pillow raise almost anything.
        except Exception as error:
            raise gr.Error("The picture cannot be read.", print_exception=False) from error

    editor.preprocess = preprocess  # pyright: ignore[reportAttributeAccessIssue]
    return editor
