# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`."""

import argparse
import json
import sys
from pathlib import Path
from typing import cast

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from . import DIGITS_CHECKPOINT, VARPipeline, VARPipelineOutput, __version__
from .conversion import load_official_var, load_official_vqvae


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bounds the copy in memory while the weights are written.
MAX_SHARD_SIZE = "2GB"


def main(arguments: list[str] | None = None) -> int:
    """Run `hf-var` with `arguments`, by default those of the process; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"hf-var {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f'hf-var {options.command}: {error}. Try: pip install "hf_var[train]"', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-var", description="Visual autoregressive models (VAR).")
    parser.add_argument("--version", action="version", version=f"hf-var {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_convert(commands)
    _add_tokenize(commands)
    _add_scaling(commands)
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="draw images of classes",
        description="Draw one image per class label and save them side by side. Without --model, handwritten digits are "
        "drawn with the checkpoint that ships with the package.",
        epilog="example: hf-var generate --class-labels 3 1 4 1 5 --resize 128 --output digits.png",
    )
    parser.set_defaults(run=_generate)
    parser.add_argument("--model", default=DIGITS_CHECKPOINT, metavar="REPO", help="pipeline folder or Hub repo")
    parser.add_argument(
        "--class-labels", nargs="+", default=["none"], metavar="LABEL", help="ids or names, 'none' for unconditional"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="picture to write, such as out.png")
    parser.add_argument("--num-images-per-label", type=int, default=1, metavar="N", help="images of each label (1)")
    parser.add_argument("--columns", type=int, metavar="N", help="images in a row (all)")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="height and width of each image in the picture")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--guidance-scale", type=float, metavar="W", help="1 is off (the checkpoint's, or 2.5)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="0 is off (900, or all of a smaller codebook)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="0 and 1 are off (the checkpoint's, or 0.96)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="above 1 for more variety")
    sampling.add_argument("--smooth", action="store_true", help="mix code vectors: smoother, less detailed images")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps, ... (the fastest there is)")
    machine.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights (float32)")
    machine.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub repo")
    machine.add_argument("--variant", metavar="NAME", help="load the weights of this variant, such as fp16")


def _generate(options: argparse.Namespace) -> None:
    suffix = options.output.suffix.lower()
    if suffix not in Image.registered_extensions():
        raise ValueError(f"--output must be a picture file such as out.png, got {str(options.output)!r}.")
    for name in ("columns", "resize"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    pipe = VARPipeline.from_pretrained(
        options.model, dtype=DTYPES[options.dtype], revision=options.revision, variant=options.variant
    )
    device = options.device or _fastest_device()
    output = pipe.to(device)(
        class_labels=[_label(text) for text in options.class_labels],
        guidance_scale=options.guidance_scale,
        top_k=options.top_k,
        top_p=options.top_p,
        temperature=options.temperature,
        smooth=options.smooth,
        num_images_per_label=options.num_images_per_label,
        generator=torch.Generator().manual_seed(options.seed),
    )
    images = cast(list[Image.Image], cast(VARPipelineOutput, output).images)
    if options.resize is not None:
        images = [image.resize((options.resize, options.resize), Image.Resampling.LANCZOS) for image in images]
    columns = min(options.columns or len(images), len(images))
    blank = Image.new(images[0].mode, images[0].size)
    images += [blank] * (-len(images) % columns)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(options.output)
    print(f"wrote {options.output}")


def _label(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return int(text) if text.lstrip("-").isdecimal() else text


def _fastest_device() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def _add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="turn official checkpoints into a pipeline folder",
        description="Convert checkpoints of the official VAR code. With both files the output is a VARPipeline folder, "
        "with one of them the folder of that model.",
        epilog="example: hf-var convert --vqvae vae_ch160v4096z32.pth --var var_d16.pth --output var-d16-256",
    )
    parser.set_defaults(run=_convert)
    parser.add_argument("--vqvae", type=Path, metavar="FILE", help="tokenizer, .pth or .safetensors")
    parser.add_argument("--var", type=Path, metavar="FILE", help="transformer, .pth or .safetensors")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub repo, such as user/var-d16-256")
    parser.add_argument("--private", action="store_true", help="make a new Hub repo private")
    unknown = parser.add_argument_group("what a file may not tell")
    unknown.add_argument("--patch-nums", type=int, nargs="+", metavar="N", help="side of every token map")
    unknown.add_argument("--num-attention-heads", type=int, metavar="N", help="heads of a model without QK-norm")
    unknown.add_argument("--id2label", type=Path, metavar="FILE", help="JSON file with the label names, in order")


def _convert(options: argparse.Namespace) -> None:
    if options.vqvae is None and options.var is None:
        raise ValueError("pass --vqvae, --var or both.")
    shared = {} if options.patch_nums is None else {"patch_nums": options.patch_nums}
    models = {}
    if options.var is not None:
        fields = dict(shared)
        if options.num_attention_heads is not None:
            fields["num_attention_heads"] = options.num_attention_heads
        if options.id2label is not None:
            fields["id2label"] = _read_label_names(options.id2label)
        models["transformer"] = load_official_var(options.var, **fields)
        # The transformer's file tells the schedule, the tokenizer's only how many scales it has.
        shared = {"patch_nums": models["transformer"].config.patch_nums}
    if options.vqvae is not None:
        models["vqvae"] = load_official_vqvae(options.vqvae, **shared)
    converted = VARPipeline(**models) if len(models) == 2 else next(iter(models.values()))
    upload = {}
    if options.push_to_hub is not None:
        upload = {"push_to_hub": True, "repo_id": options.push_to_hub, "private": options.private or None}
    # A string: diffusers cannot split a path when it uploads.
    converted.save_pretrained(str(options.output), max_shard_size=MAX_SHARD_SIZE, **upload)
    print(f"wrote {options.output}")
    if options.push_to_hub is not None:
        print(f"pushed to {options.push_to_hub}")


def _read_label_names(path: Path) -> dict[int, str]:
    names = json.loads(path.read_text(encoding="utf-8"))
    return dict(enumerate(names)) if isinstance(names, list) else {int(label): name for label, name in names.items()}


def _add_tokenize(commands) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="turn a data set of images into codes",
        description="Encode the images of a data set once, into parquet files of codes for the training of a "
        "transformer. Killed and given again, the command goes on where it was. Needs the extra `train`; "
        "examples/tokenize_dataset.py does the same in several processes.",
        epilog="example: hf-var tokenize --data user/images --vqvae user/vqvae --horizontal-flip --output codes",
    )
    parser.set_defaults(run=_tokenize)
    parser.add_argument(
        "--data", required=True, help="Hub data set, folder of class folders, or glob of parquet or tar files"
    )
    parser.add_argument("--vqvae", required=True, metavar="REPO", help="tokenizer, a folder or Hub repo")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Hub data set, such as user/codes")
    parser.add_argument("--license", metavar="NAME", help="licence of the images, for the data set card")
    source = parser.add_argument_group("data")
    source.add_argument("--split", metavar="NAME", help="train, or the only split")
    source.add_argument("--image-column", metavar="NAME", help="the only column with images")
    source.add_argument("--label-column", metavar="NAME", help="label, cls or the only column of labels")
    source.add_argument("--num-labels", type=int, metavar="N", help="0 leaves labels out (as many as the data names)")
    source.add_argument("--streaming", action="store_true", help="read the data as it comes, without an index")
    source.add_argument(
        "--max-broken-share", type=float, metavar="X", help="stop above this share of broken images (0.01)"
    )
    crops = parser.add_argument_group("crops")
    crops.add_argument("--num-crops", type=int, metavar="N", help="random crops of each image (1: the centre)")
    crops.add_argument("--horizontal-flip", action="store_true", help="add the mirror image of every crop")
    crops.add_argument(
        "--resize-ratio", type=float, metavar="X", help="images cover X times the size they are cut to (1.125)"
    )
    crops.add_argument("--interpolation", metavar="NAME", help="lanczos, bicubic, bilinear, hamming or box (lanczos)")
    crops.add_argument("--seed", type=int, help="seed of the draws (0)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--rows-per-shard", type=int, metavar="N", help="images that become one file (10000)")
    machine.add_argument("--batch-size", type=int, metavar="N", help="crops per forward pass (64)")
    machine.add_argument("--dataloader-num-workers", type=int, metavar="N", help="processes that load images (0)")
    machine.add_argument("--mixed-precision", metavar="NAME", help="no, fp16 or bf16 (no)")


def _tokenize(options: argparse.Namespace) -> None:
    # What it needs comes with an extra.
    from accelerate import Accelerator

    from .training.tokenization import TokenizationArguments, tokenize_dataset

    # The defaults are those of the script.
    given = {name: value for name, value in vars(options).items() if value is not None}
    del given["run"], given["command"]
    given["output_dir"] = given.pop("output")
    if options.push_to_hub is not None:
        given |= {"push_to_hub": True, "hub_dataset_id": options.push_to_hub}
    args = TokenizationArguments(**given)
    count = tokenize_dataset(args, Accelerator(mixed_precision=args.mixed_precision))
    print(f"wrote {count.rows} rows of codes from {count.images - count.broken_images} images to {options.output}")
    if options.push_to_hub is not None:
        print(f"pushed to {options.push_to_hub}")


def _add_scaling(commands) -> None:
    parser = commands.add_parser(
        "scaling",
        help="fit power laws of loss against size and compute",
        description="Fit the power laws of validation loss and error rate against parameters and training compute, from "
        "the logs of models of at least three sizes, print them and draw them. Needs the extra `train`.",
        epilog="example: hf-var scaling outputs/d4 outputs/d6 outputs/d8 outputs/d10 --output scaling.png",
    )
    parser.set_defaults(run=_scaling)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a training, or its train_log.jsonl"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="plot to write, such as scaling.png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def _scaling(options: argparse.Namespace) -> None:
    # What it needs comes with an extra.
    from .training.pictures import scaling_plot
    from .training.scaling import fit_scaling_laws, read_scaling_run, scaling_json, scaling_table

    runs = [read_scaling_run(path) for path in options.runs]
    laws = fit_scaling_laws(runs)
    plot = scaling_plot(runs, laws)
    file_types = plot.canvas.get_supported_filetypes()
    if options.output.suffix.lower().removeprefix(".") not in file_types:
        raise ValueError(f"--output must be a picture file such as scaling.png, got {str(options.output)!r}.")
    for path in (options.output, options.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(options.output)
    if options.json is not None:
        options.json.write_text(json.dumps(scaling_json(runs, laws), indent=2) + "\n", encoding="utf-8")
    print(scaling_table(laws))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(main())
