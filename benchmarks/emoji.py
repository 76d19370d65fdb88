# SPDX-License-Identifier: Apache-2.0
"""
Emoji from prompts: how often a picture shows what its prompt names, how much is copied, and how real it looks.

    python examples/prepare_emoji.py *.tgz --output data/emoji
    python benchmarks/emoji.py judge --data data/emoji --output judge.safetensors
    python benchmarks/emoji.py measure outputs/text_emoji --data data/emoji --judge judge.safetensors --output outputs/emoji

The judge is a small classifier of names, trained on the real pictures, of both vendors and slightly moved, apart from any other
model. Its features tell how alike pictures are. `measure` prints, for pictures of as many prompts as `--number`:

named           share of pictures whose most alike real picture has the name of the prompt: among all training pictures for their
                names, among the held-out ones for theirs. The tokenizer's reconstructions of the real pictures are what no
                picture can be better than.
copies          share of pictures that are more alike to a training picture than 95 % of the held-out real ones are.
frechet         Fréchet distance to the real training pictures, in the features: of the pictures, of reconstructions of training
                pictures, and of the held-out real ones.
coloured        share of pictures of new combinations, such as "a blue apple", whose main colour is the one of the prompt.

and draws three grids of pictures that are not chosen: of names of the training, of held-out ones, and of new combinations.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cifar10_features
import datasets
import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from hf_var import VARTextToImagePipeline
from hf_var.metrics.generation import frechet_distance, moments


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import prepare_emoji


SIZE = 32
BATCH = 50
COPIES = 8
# What is drawn in all colours.
NAMES = ("apple", "cat face", "car", "book", "rose", "ghost", "fish", "t-shirt")
# Darker pixels are part of a picture.
WHITE = 235
SCALE = 2
COLUMNS = 8


def on_white(image: Image.Image) -> Image.Image:
    """A picture of the models' size without transparency."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB").resize((SIZE, SIZE))


def read_pictures(path: Path) -> tuple[list[Image.Image], list[str]]:
    """Pictures and their names, of rows whose caption is a name of the picture as it was drawn."""
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    chosen = [number for number, is_plain in enumerate(rows["is_plain"]) if is_plain]
    rows = rows.select(chosen)
    return [on_white(image) for image in rows["image"]], list(rows["name"])


def as_bytes(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """`(number, 3, height, width)`."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def moved(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """The picture slightly turned, moved and scaled, on white."""
    angle, (right, down), zoom = generator.uniform(-8, 8), generator.uniform(-2, 2, 2), generator.uniform(0.9, 1.1)
    side = round(SIZE * zoom)
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, translate=(right, down), fillcolor="white")
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(turned.resize((side, side)), ((SIZE - side) // 2, (SIZE - side) // 2))
    return canvas


def train_judge(args: argparse.Namespace) -> None:
    """Train the classifier of names, and write it."""
    pictures, names = read_pictures(args.data / "train.parquet")
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    generator = np.random.default_rng(args.seed)
    images = as_bytes([moved(picture, generator) for picture in pictures for _ in range(COPIES)])
    labels = torch.tensor([numbers[name] for name in names for _ in range(COPIES)])
    judge = cifar10_features.train(images, labels, args.epochs, args.seed)
    save_file({name: values.contiguous() for name, values in judge.state_dict().items()}, args.output)
    own = torch.tensor([numbers[name] for name in names])
    print(
        f"training pictures as they are: {cifar10_features.accuracy(judge, as_bytes(pictures), own):.3f} named right"
    )


class Judge:
    """The features of the classifier, of length 1."""

    def __init__(self, path: Path):
        weights = load_file(path)
        self.classifier = cifar10_features.Classifier(len(weights["head.bias"]))
        self.classifier.load_state_dict(weights)
        self.classifier.eval().requires_grad_(False)

    def features(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pieces = as_bytes(pictures).split(250)
        found = torch.cat([self.classifier(piece) for piece in pieces])
        return torch.nn.functional.normalize(found, dim=1)


def nearest(features: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest cosine of each picture's features with those of the reference, and where it is."""
    return (features @ reference.T).max(dim=1)


def new_combinations(path: Path) -> list[str]:
    """Colours and names that no caption of the training has together."""
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    known = {caption.removeprefix("a ").removeprefix("an ") for caption in rows["caption"]}
    pairs = [f"{colour} {name}" for name in NAMES for colour in prepare_emoji.HUES]
    return [f"a {pair}" for pair in pairs if pair not in known]


def draw(pipe: VARTextToImagePipeline, prompts: Sequence[str], generator: torch.Generator) -> list[Image.Image]:
    """A picture of each prompt."""
    found: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        found += pipe(list(prompts[first : first + BATCH]), generator=generator).images
    return found


def reconstruct(pipe: VARTextToImagePipeline, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures after the tokenizer."""
    found: list[Image.Image] = []
    for first in range(0, len(pictures), BATCH):
        codes = pipe.encode_images(list(pictures[first : first + BATCH]))
        found += pipe.image_processor.postprocess(pipe.vqvae.decode(codes).sample, output_type="pil")
    return found


def main_colour(picture: Image.Image) -> str | None:
    """The name of the main colour of what is not white, if there is one."""
    transparent = picture.convert("RGBA")
    pixels = np.asarray(picture).min(axis=-1)
    transparent.putalpha(Image.fromarray(np.where(pixels > WHITE, 0, 255).astype(np.uint8)))
    hue, _ = prepare_emoji.main_hue(transparent)
    if hue is None:
        return None
    return min(prepare_emoji.HUES, key=lambda name: prepare_emoji.distance(hue, prepare_emoji.HUES[name]))


def shares_of_names(
    features: torch.Tensor, names: Sequence[str], real: torch.Tensor, real_names: Sequence[str]
) -> float:
    """How many pictures have the name of the real one that is most alike."""
    _, where = nearest(features, real)
    return float(np.mean([real_names[index] == name for index, name in zip(where.tolist(), names, strict=True)]))


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print the figures, and draw the grids."""
    pipe = VARTextToImagePipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    judge, generator = Judge(args.judge), torch.Generator().manual_seed(args.seed)
    (train, train_names), (test, test_names) = (
        read_pictures(args.data / f"{part}.parquet") for part in ("train", "test")
    )
    real, unseen = judge.features(train), judge.features(test)
    order = np.random.default_rng(args.seed).permutation(len(train))
    prompts = [train_names[order[number % len(order)]] for number in range(args.number)]
    held_out = list(dict.fromkeys(test_names))
    combinations = new_combinations(args.data / "train.parquet")

    pictures, unseen_pictures = draw(pipe, prompts, generator), draw(pipe, held_out, generator)
    coloured = draw(pipe, combinations, generator)
    decoded, unseen_decoded = (
        reconstruct(pipe, [train[number] for number in order[: args.number]]),
        reconstruct(pipe, test),
    )
    of_pictures, of_decoded = judge.features(pictures), judge.features(decoded)
    decoded_names = [train_names[number] for number in order[: args.number]]
    print(f"named, training names: {shares_of_names(of_pictures, prompts, real, train_names):.3f}")
    print(
        f"named, training names, reconstructions: {shares_of_names(of_decoded, decoded_names, real, train_names):.3f}"
    )
    found = shares_of_names(judge.features(unseen_pictures), held_out, unseen, test_names)
    print(f"named, held-out names: {found:.3f}, by chance {1 / len(held_out):.3f}")
    found = shares_of_names(judge.features(unseen_decoded), test_names, unseen, test_names)
    print(f"named, held-out names, reconstructions: {found:.3f}")
    alike, _ = nearest(judge.features(unseen_decoded), real)
    limit = alike.quantile(0.95)
    for name, values in (("training names", of_pictures), ("held-out names", judge.features(unseen_pictures))):
        print(f"copies, {name}: {(nearest(values, real)[0] > limit).float().mean():.3f}, of real held-out ones 0.05")
    reference = moments(real.double())
    for name, values in (("pictures", of_pictures), ("reconstructions", of_decoded), ("held-out real ones", unseen)):
        print(f"frechet, {name}: {frechet_distance(moments(values.double()), reference):.4f}")
    asked = [prompt.split()[1] for prompt in combinations]
    right = [main_colour(picture) == colour for picture, colour in zip(coloured, asked, strict=True)]
    print(f"coloured, new combinations: {np.mean(right):.3f}, by chance {1 / len(prepare_emoji.HUES):.3f}")

    args.output.mkdir(parents=True, exist_ok=True)
    chosen = {"training": (prompts, pictures), "held_out": (held_out, unseen_pictures)}
    chosen["new"] = (combinations, coloured)
    for name, (texts, found) in chosen.items():
        captioned_grid(found[:64], texts[:64]).save(args.output / f"{name}.png")


def captioned_grid(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Image.Image:
    """Pictures in rows, each above its text."""
    side, line = SIZE * SCALE, 12
    rows = -(-len(pictures) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * (side + 8), rows * (side + line + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(number, COLUMNS)
        place = column * (side + 8) + 4, row * (side + line + 4)
        canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
        pen.text((place[0], place[1] + side), text[:13], fill="black")
    return canvas


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    trained = commands.add_parser("judge", help="train the judge")
    trained.add_argument("--data", type=Path, required=True)
    trained.add_argument("--output", type=Path, required=True)
    trained.add_argument("--epochs", type=int, default=20)
    trained.add_argument("--seed", type=int, default=0)
    trained.set_defaults(run=train_judge)
    measured = commands.add_parser("measure", help="measure a pipeline")
    measured.add_argument("pipeline")
    measured.add_argument("--data", type=Path, required=True)
    measured.add_argument("--judge", type=Path, required=True)
    measured.add_argument("--output", type=Path, required=True, help="folder of the grids")
    measured.add_argument("--number", type=int, default=1000)
    measured.add_argument("--seed", type=int, default=0)
    measured.set_defaults(run=measure)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
