# SPDX-License-Identifier: Apache-2.0
"""
Draw images from a folder that `hf-var export` wrote. Needs onnxruntime, numpy and Pillow, and tokenizers for prompts, but
neither torch nor hf_var.

    hf-var export --output digits_onnx
    python examples/draw_onnx.py digits_onnx --class-labels 3 1 4 --output digits.png
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


class Graphs:
    """The graphs in a folder, by their names, and what `export.json` says of them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.description = json.loads((self.folder / "export.json").read_text(encoding="utf-8"))
        self.sessions: dict = {}

    def __call__(self, name: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of a graph, by their names."""
        import onnxruntime

        if name not in self.sessions:
            path = str(self.folder / f"{name}.onnx")
            self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return dict(
            zip(self.description["graphs"][name]["outputs"], self.sessions[name].run(None, inputs), strict=True)
        )


def condition_of(
    graphs: Graphs, class_labels: Sequence[str | int] | None, prompts: Sequence[str] | None, guided: bool
) -> dict[str, np.ndarray]:
    """What the transformer reads of labels or prompts; if `guided`, that of no label or text behind it."""
    if prompts is not None:
        found = graphs("text_encoder", text_ids=text_ids(graphs, [*prompts, *[""] * (len(prompts) * guided)]))
        if graphs.description["learned_empty_text"]:
            # A text without tokens stands for the vectors that the model has learned for it.
            found = {
                name: np.concatenate([each[: len(prompts)], 0 * each[len(prompts) :]]) for name, each in found.items()
            }
        if "crop_sizes" in graphs.description["graphs"]["condition"]["inputs"]:
            found["crop_sizes"] = np.full((len(found["pooled_projections"]), 2), 512)
        return graphs("condition", **found)
    nothing = graphs.description["num_labels"] or 0
    names = {name: int(label) for label, name in graphs.description["id2label"].items()}
    labels = [nothing if label == "none" else names.get(str(label), label) for label in class_labels or ["none"]]
    return graphs("condition", class_labels=np.array([*labels, *[nothing] * (len(labels) * guided)], np.int64))


def text_ids(graphs: Graphs, prompts: Sequence[str]) -> np.ndarray:
    """Ids `(batch, text encoders, tokens)` of texts, filled up with -1."""
    from tokenizers import Tokenizer

    length, found = graphs.description["text_length"], []
    for path in sorted(graphs.folder.glob("tokenizer*/tokenizer.json")):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        ids = [tokenizer.encode(text).ids for text in prompts]
        found.append([[*single, *[-1] * (length - len(single))] for single in ids])
    return np.array(found, np.int64).swapaxes(0, 1)


def draw(
    graphs: Graphs,
    condition: dict[str, np.ndarray],
    noise: Callable[[tuple[int, ...]], np.ndarray],
    guidance_scale: float,
    top_k: Sequence[int],
    top_p: Sequence[float],
    temperature: Sequence[float],
) -> np.ndarray:
    """
    Codes `(batch, length)`, sampled scale after scale. `noise` makes exponential numbers of a shape, and the other
    arguments have one value per scale, beside `guidance_scale`, which is off at 1.
    """
    description = graphs.description
    lengths, guided = description["block_lengths"], guidance_scale != 1
    batch = len(condition["condition"]) // (1 + guided)
    codes = np.zeros((batch, sum(lengths)), np.int64)
    inputs = description["graphs"]["transformer"]["inputs"]
    sizes = {"batch": batch * (1 + guided), "past": 0}
    past = {
        name: np.zeros([sizes.get(size, size) for size in inputs[name]["shape"]], np.float32)
        for name in ("past_keys", "past_values")
        if name in inputs
    }
    begin = 0
    for k, length in enumerate(lengths):
        read = dict(past)
        if "scale_inputs" in inputs:
            # Of all scales, but the transformer reads those up to this one, of which the codes are known.
            known = graphs("scale_inputs", codes=codes)["scale_inputs"]
            read["scale_inputs"] = np.concatenate([known, known]) if guided else known
        positions = np.arange(begin, begin + length)
        outputs = graphs("transformer", **condition, **read, positions=positions)
        past = {name: outputs[name.removeprefix("past_")] for name in past}
        logits = outputs["logits"]
        if guided:
            is_linear = description["sampling"]["guidance_rule"] == "linear" and len(lengths) > 1
            weight = 1 + (guidance_scale - 1) * (k / (len(lengths) - 1) if is_linear else 1)
            logits = weight * logits[:batch] + (1 - weight) * logits[batch:]
        kept = filtered(logits / temperature[k], top_k[k], top_p[k])
        # The most probable code after a division by exponential noise is a draw.
        codes[:, begin : begin + length] = (softmax(kept) / noise(kept.shape)).argmax(-1)
        begin += length
    return codes


def filtered(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Logits of which all but the `top_k` largest, and the largest that hold the probability `top_p`, are minus infinity."""
    descending = -np.sort(-logits, axis=-1)[..., : top_k or None]
    num_kept = np.full(logits.shape[:-1], descending.shape[-1])
    if 0 < top_p < 1:
        probabilities = softmax(descending)
        num_kept = np.maximum((probabilities.cumsum(-1) - probabilities < top_p).sum(-1), 1)
    smallest = np.take_along_axis(descending, num_kept[..., None] - 1, axis=-1)
    return np.where(logits >= smallest, logits, -np.inf).astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def pictures(sample: np.ndarray) -> list[Image.Image]:
    """Images of `(batch, channels, height, width)` in [-1, 1]."""
    pixels = ((sample.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return [Image.fromarray(image.transpose(1, 2, 0).squeeze()) for image in pixels]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw images from a folder that `hf-var export` wrote, without torch."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--class-labels", nargs="+", metavar="LABEL", help="ids or names, 'none' for unconditional")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts, for a model that reads them")
    parser.add_argument("--guidance-scale", type=float, help="1 is off (the checkpoint's)")
    parser.add_argument("--top-k", type=int, help="0 is off (the checkpoint's)")
    parser.add_argument("--top-p", type=float, help="0 and 1 are off (the checkpoint's)")
    parser.add_argument("--temperature", type=float, help="above 1 for more variety (the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="height and width of each image in the picture")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="picture to write")
    options = parser.parse_args(arguments)
    graphs = Graphs(options.folder)
    description = graphs.description
    sampling = dict(description.get("sampling", {}))
    is_pipeline = description["format"] == "onnx" and "transformer" in description["graphs"] and len(sampling) > 0
    if not is_pipeline or len(description["block_lengths"]) != len(sampling["top_k"]):
        parser.error(f"{options.folder} holds no pipeline in ONNX that samples whole scales.")
    if description.get("num_pixel_classes") is not None:
        parser.error(f"{options.folder} holds a pipeline of class maps, which this script does not draw.")
    if (options.prompt is not None) != ("text_encoder" in description["graphs"]):
        parser.error("--prompt goes with models that read texts, which need it.")
    if options.prompt is None:
        known = {"none", *description["id2label"], *description["id2label"].values()}
        if unknown := [label for label in options.class_labels or [] if label not in known]:
            parser.error(f"--class-labels must be ids or names of the model's classes, got {unknown[0]!r}.")
    sampling.pop("guidance_rule")
    for name, default in sampling.items():
        given = getattr(options, name)
        if given is not None:
            sampling[name] = [given] * len(default) if isinstance(default, list) else given
    guided = sampling["guidance_scale"] != 1
    condition = condition_of(graphs, options.class_labels, options.prompt, guided)
    codes = draw(graphs, condition, np.random.default_rng(options.seed).standard_exponential, **sampling)
    images = pictures(graphs("decode", codes=codes)["sample"])
    if options.resize is not None:
        images = [image.resize((options.resize, options.resize), Image.Resampling.LANCZOS) for image in images]
    width, height = images[0].size
    row = Image.new(images[0].mode, (width * len(images), height))
    for number, image in enumerate(images):
        row.paste(image, (width * number, 0))
    row.save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
