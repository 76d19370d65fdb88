# SPDX-License-Identifier: Apache-2.0
"""The tabs of the page. Each returns the input that a drawn picture can be sent to."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr
from PIL import Image

from .components import (
    INTERNAL,
    answering,
    canvas,
    gallery,
    on_press,
    picture_input,
    picture_outputs,
    sampling_inputs,
    scored_input,
    slider,
)
from .demo import NO_PICTURE, Demo, Frame, SamplingInputs


# A picture with layers, as Gradio's editor gives it.
Drawing = dict[str, Any] | None


def draw_tab(demo: Demo) -> tuple[gr.Gallery, gr.State, gr.Row]:
    """Its pictures, the number of the one that is chosen, and the place for what sends it to other tabs."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            inputs = sampling_inputs(demo, has_examples=True)
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=3, min_width=300):
            outputs = picture_outputs(demo)
            sending = gr.Row()
    on_press(button, partial(_draw, demo), inputs, outputs)
    pictures, chosen = outputs[0], gr.State(0)
    pictures.select(_number_of_selected, None, chosen, **INTERNAL)
    return pictures, chosen, sending


def repaint_tab(demo: Demo) -> gr.ImageEditor:
    with gr.Row():
        with gr.Column(scale=2, min_width=260):
            inputs = sampling_inputs(demo)
            keeps_rest = gr.Checkbox(True, label="Keep the rest exactly as it is")
            button = gr.Button("Repaint", variant="primary")
        with gr.Column(scale=3, min_width=320):
            editor = canvas()
        with gr.Column(scale=3, min_width=320):
            outputs = picture_outputs(demo)
    on_press(button, partial(_repaint, demo), [editor, keeps_rest, *inputs], outputs)
    editor.upload(partial(_fit, demo), editor, editor, **INTERNAL)
    return editor


def vary_tab(demo: Demo) -> gr.Image:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_input()
            inputs = sampling_inputs(demo)
            info = f"share of the {len(demo.config.patch_nums)} scales that are drawn anew"
            strength = slider(0, 1, 0.5, 0.05, "Strength", info=info)
            button = gr.Button("Vary", variant="primary")
        with gr.Column(scale=3, min_width=300):
            outputs = picture_outputs(demo)
    on_press(button, partial(_vary, demo), [picture, strength, *inputs], outputs)
    return picture


def score_tab(demo: Demo) -> gr.Image:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_input()
            condition = scored_input(demo)
            button = gr.Button("Score", variant="primary")
        with gr.Column(scale=3, min_width=300):
            has_choice = demo.reads_texts or len(demo.class_names) > 1
            classes = gr.Label(label="What it shows", num_top_classes=10, visible=has_choice)
            likelihood = gr.Markdown(label="How likely it is")
    on_press(button, partial(_score, demo), [picture, condition], [classes, likelihood])
    return picture


def reconstruct_tab(demo: Demo) -> gr.Image:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_input()
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column(scale=3, min_width=300):
            gr.Markdown("The picture as the model reads it, and what its codes keep of it after each scale:")
            scales = gallery(3)
    on_press(button, partial(_reconstruct, demo), [picture], [scales])
    return picture


def send(
    demo: Demo, tab: str, pictures: list[tuple[str, str | None]] | None, chosen: int
) -> Iterator[tuple[str, gr.Tabs]]:
    """A drawn picture for the input of another tab, which is opened."""
    with answering() as save:
        if not pictures:
            raise ValueError("Draw a picture first.")
        path, _ = pictures[chosen if chosen < len(pictures) else 0]
        if tab == "Repaint":
            path = save(demo.on_canvas(demo.read_picture(path)), "canvas")
        yield path, gr.Tabs(selected=tab)


def _number_of_selected(event: gr.SelectData) -> int:
    return event.index


def _draw(demo: Demo, condition: Any, guidance_scale: Any, number: Any, seed: Any) -> Iterator[tuple]:
    with answering() as save:
        yield from _shown(demo.draw(SamplingInputs(condition, guidance_scale, number, seed)), save)


def _repaint(
    demo: Demo, drawing: Drawing, keeps_rest: bool, condition: Any, guidance_scale: Any, number: Any, seed: Any
) -> Iterator[tuple]:
    with answering() as save:
        inputs = SamplingInputs(condition, guidance_scale, number, seed)
        yield from _shown(demo.repaint(*_painted(drawing), keeps_rest, inputs), save)


def _vary(
    demo: Demo, picture: str | None, strength: Any, condition: Any, guidance_scale: Any, number: Any, seed: Any
) -> Iterator[tuple]:
    with answering() as save:
        inputs = SamplingInputs(condition, guidance_scale, number, seed)
        yield from _shown(demo.vary(demo.read_picture(picture), strength, inputs), save)


def _score(demo: Demo, picture: str | None, condition: Any) -> Iterator[tuple[dict[str, float] | None, str]]:
    with answering():
        found, classes = demo.score(demo.read_picture(picture), condition)
        rows = [f"| {name} | {bits:.2f} |" for name, bits in found]
        yield classes, "\n".join(["| token maps | bits per token |", "|---|---|", *rows])


def _reconstruct(demo: Demo, picture: str | None) -> Iterator[list[tuple[str, str]]]:
    with answering() as save:
        found = demo.reconstruct(demo.read_picture(picture))
        yield [(save(step, number), name) for number, (step, name) in enumerate(found)]


def _fit(demo: Demo, drawing: Drawing) -> Iterator[str]:
    with answering() as save:
        picture, _ = _painted(drawing)
        yield save(demo.on_canvas(picture), "canvas")


def _shown(frames: Iterator[Frame], save: Any) -> Iterator[tuple]:
    """What the two galleries show, the first one in about as many columns as rows."""
    for step, frame in enumerate(frames):
        pictures = [save(picture, f"{step}-{number}") for number, picture in enumerate(frame.pictures)]
        scales = [(save(picture, f"scale-{number}"), name) for number, (picture, name) in enumerate(frame.scales)]
        yield gr.Gallery(pictures, columns=math.ceil(math.sqrt(len(pictures)))), scales


def _painted(drawing: Drawing) -> tuple[Image.Image, Image.Image]:
    """The picture on the canvas, and where it is painted over: white."""
    if drawing is None or drawing["background"] is None:
        raise ValueError(NO_PICTURE)
    mask = Image.new("L", drawing["background"].size)
    for layer in drawing["layers"]:
        mask.paste(255, mask=layer.getchannel("A").resize(mask.size).point(lambda alpha: 255 * (alpha > 127)))
    return drawing["background"], mask
