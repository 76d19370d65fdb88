# SPDX-License-Identifier: Apache-2.0
"""
From segmentation maps to images: how well VQGAN's GPT follows a condition image.

The maps are made of CIFAR-10's own images: each pixel is the nearest of eight colours, the centres of a k-means of the training
images' pixels, and then the most frequent one of the 3x3 pixels around it. So a map tells where which colour is and nothing of
textures and details.

    python benchmarks/segmentation.py prepare --train_data "cifar10/train-*.parquet" --test_data "cifar10/test-*.parquet" \
        --output data/cifar10_maps
    python examples/train_vqvae.py examples/recipes/vqvae_cifar10_plain.yaml
    python examples/train_vqvae.py examples/recipes/vqgan_cifar10_maps.yaml
    python examples/train_rq.py examples/recipes/gpt_cifar10_maps.yaml
    python benchmarks/segmentation.py measure outputs/gpt_cifar10_maps --data data/cifar10_maps --picture maps.png

`measure` prints, for unseen images:

bits of a code       given the image's own map, and given another image's map: what the condition tells.
pixels as asked for  share of pixels whose colour, by the same rule, is that of the map: of samples, of the images
                     themselves after the tokenizer (what no sample can do better than), and of other images (chance).

The picture has a column for each map: the map, two samples that are not chosen, and the image that it was made of.
"""

import argparse
import math
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.cluster import MiniBatchKMeans

from hf_var import ARPipeline
from hf_var.data import find_image_column, load_source
from hf_var.pipelines.image_grids import image_grid
from hf_var.priors.likelihood import stack_log_probs


COLOURS = 8
BATCH = 64
# Images whose pixels k-means sees.
SEEN = 2000


def nearest_colours(image: Image.Image, palette: np.ndarray) -> Image.Image:
    """The map of an image, a picture of the numbers of colours."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    distances = ((pixels[:, :, None] - palette) ** 2).sum(axis=-1)  # (height, width, colours)
    return Image.fromarray(distances.argmin(axis=-1).astype(np.uint8)).filter(ImageFilter.ModeFilter(3))


def prepare(args: argparse.Namespace) -> None:
    """Write parquet files of images and their maps, and the colours."""
    train = load_images("train_data", args.train_data)
    pixels = np.concatenate([np.asarray(row["image"].convert("RGB")).reshape(-1, 3) for row in train.take(SEEN)])
    clusters = MiniBatchKMeans(COLOURS, random_state=0, n_init=3).fit(pixels.astype(np.float32))
    palette = clusters.cluster_centers_.astype(np.float32)
    args.output.mkdir(parents=True, exist_ok=True)
    np.save(args.output / "palette.npy", palette)
    features = datasets.Features({"image": datasets.Image(), "map": datasets.Image()})
    for name, source in (("train", args.train_data), ("test", args.test_data)):
        rows = load_images(name, source)
        paired = rows.map(
            lambda row: {"image": row["image"], "map": nearest_colours(row["image"], palette)},
            features=features,
            remove_columns=rows.column_names,
        )
        paired.to_parquet(args.output / f"{name}.parquet")


def load_images(argument: str, source: str, *columns: str) -> datasets.Dataset:
    """A data set with the images of these columns, or of the only one, as pictures."""
    rows = load_source(argument, source, None, ["train"])
    columns = columns or (find_image_column(rows, None),)
    for column in columns:
        rows = rows.cast_column(column, datasets.Image())
    return rows if len(columns) > 1 or columns == ("image",) else rows.rename_column(columns[0], "image")


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print the figures and write the picture."""
    pipe = ARPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    palette = np.load(args.data / "palette.npy")
    rows = load_images("data", str(args.data / "test.parquet"), "image", "map").take(args.number)
    images, maps = [row["image"].convert("RGB") for row in rows], [row["map"] for row in rows]
    codes, ids = encode(pipe, images, maps)
    for name, condition in (("its own map", ids), ("another image's map", ids.roll(1, dims=0))):
        print(f"bits of a code given {name}: {bits(pipe, codes, condition):.3f}")
    generator = torch.Generator().manual_seed(args.seed)
    samples = []
    for piece in ids.split(BATCH):
        samples += pipe(condition_codes=piece, generator=generator).images
    decoded = []
    for piece in codes.split(BATCH):
        decoded += pipe.image_processor.postprocess(pipe.vqvae.decode(piece).sample, output_type="pil")
    others = images[1:] + images[:1]
    for name, found in (("samples", samples), ("the images after the tokenizer", decoded), ("other images", others)):
        print(f"pixels as asked for, of {name}: {100 * agreement(found, maps, palette):.1f} %")
    if args.picture is not None:
        draw(pipe, ids[: args.columns], maps, images, palette, generator).save(args.picture)


def encode(pipe: ARPipeline, images: list, maps: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of images and of their maps."""
    codes, ids = [], []
    for first in range(0, len(images), BATCH):
        codes.append(pipe.encode_images(images[first : first + BATCH]))
        ids.append(pipe.encode_conditions(maps[first : first + BATCH]))
    return torch.cat(codes), torch.cat(ids)


def bits(pipe: ARPipeline, codes: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean of -log2 of the likelihood of a code, given condition tokens."""
    found = []
    for piece, condition in zip(codes.split(BATCH), ids.split(BATCH), strict=True):
        vectors = pipe.vqvae.code_vectors(piece) if pipe.prior.config.code_inputs == "vectors" else None
        found.append(stack_log_probs(pipe.prior, piece, vectors, condition_ids=condition))
    return -torch.cat(found).mean().item() / math.log(2)


def agreement(images: list, maps: list, palette: np.ndarray) -> float:
    """Share of pixels of the colour that the map asks for."""
    pairs = zip(images, maps, strict=True)
    return float(np.mean([np.asarray(nearest_colours(image, palette)) == np.asarray(one) for image, one in pairs]))


def draw(pipe, ids: torch.Tensor, maps: list, images: list, palette: np.ndarray, generator) -> Image.Image:
    """A column for each map: the map in its colours, two samples, and the image."""
    number = len(ids)
    coloured = [Image.fromarray(palette[np.asarray(one)].round().astype(np.uint8)) for one in maps[:number]]
    samples = [pipe(condition_codes=ids, generator=generator).images for _ in range(2)]
    rows = [*coloured, *samples[0], *samples[1], *images[:number]]
    return image_grid([image.resize((64, 64), Image.Resampling.LANCZOS) for image in rows], columns=number)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    prepared = commands.add_parser("prepare", help="make maps of images")
    prepared.add_argument("--train_data", required=True)
    prepared.add_argument("--test_data", required=True)
    prepared.add_argument("--output", type=Path, required=True)
    prepared.set_defaults(run=prepare)
    measured = commands.add_parser("measure", help="measure a trained pipeline")
    measured.add_argument("pipeline")
    measured.add_argument("--data", type=Path, required=True)
    measured.add_argument("--number", type=int, default=1000, help="unseen images")
    measured.add_argument("--seed", type=int, default=0)
    measured.add_argument("--picture", type=Path)
    measured.add_argument("--columns", type=int, default=12)
    measured.set_defaults(run=measure)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
