# SPDX-License-Identifier: Apache-2.0
"""Which token maps images of a size should have, and what they cost."""

import argparse
import json
import re
from itertools import accumulate
from typing import Annotated, Any

from ..ranges import Interval, checked
from ..scales import normalize_size, scale_sizes
from ..schedules import Schedule, propose_schedules


HEAD_DIM = 64
# Costs are counted layer by layer.
NumLayers = Annotated[int, Interval(minimum=1, maximum=128)]
Width = Annotated[int, Interval(minimum=HEAD_DIM, maximum=2**16)]


def add_schedule(commands) -> None:
    """Add the command `schedule`."""
    parser = commands.add_parser(
        "schedule",
        help="propose token maps for a size of images",
        description="Propose `patch_nums`, the sizes of the token maps, for images of a size, with a reason, and tell what they "
        "cost a transformer in tokens, memory and FLOPs. docs/schedules.md explains the rule.",
        epilog="example: hf-var schedule --size 192 288 --downsampling 16 --model d20",
    )
    parser.set_defaults(check=_check, run=_schedule)
    sides = ("--size", "--image-size", "--image_size")
    parser.add_argument(
        *sides, type=int, nargs="+", required=True, metavar="PIXELS", help="side, or height and width, of the images"
    )
    parser.add_argument(
        "--downsampling",
        type=int,
        default=16,
        metavar="N",
        help="pixels per position of the tokenizer's latents, in each direction (16)",
    )
    parser.add_argument("--tokens", "--max-tokens", type=int, metavar="N", help="most tokens of an image")
    parser.add_argument("--json", action="store_true", help="print JSON")
    model = parser.add_argument_group("transformer")
    model.add_argument(
        "--model",
        default="d16",
        metavar="dN",
        help="VAR's of depth N: N layers, 64 N wide; d36 with one AdaLN projection for all (d16)",
    )
    model.add_argument(
        "--hidden-size", "--hidden_size", type=int, metavar="N", help="width, in place of that of --model"
    )
    model.add_argument("--layers", type=int, metavar="N", help="layers, in place of those of --model")


def _check(options: argparse.Namespace) -> None:
    if len(options.size) > 2:
        raise ValueError(f"--size must be one number or a height and a width, got {options.size}.")
    _propose(options)
    _transformer(options)


def _propose(options: argparse.Namespace) -> list[Schedule]:
    size = options.size[0] if len(options.size) == 1 else options.size
    try:
        return propose_schedules(size, options.downsampling, options.tokens)
    except ValueError as error:
        words = {"`image_size`": "--size", "`max_tokens`": "--tokens", "`downsampling`": "--downsampling"}
        message = str(error)
        for name, word in words.items():
            message = message.replace(name, word)
        raise ValueError(message) from error


def _transformer(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of the configuration."""
    name = re.fullmatch(r"d([1-9]\d*)", options.model)
    if name is None:
        raise ValueError(f"--model must be d and a number of layers, such as d16, got {options.model!r}.")
    depth = int(name[1])
    layers = checked("--model", depth, NumLayers)
    if options.layers is not None:
        layers = checked("--layers", options.layers, NumLayers)
    width = HEAD_DIM * depth if options.hidden_size is None else options.hidden_size
    if checked("--hidden-size", width, Width) % HEAD_DIM:
        raise ValueError(f"--hidden-size must be a multiple of {HEAD_DIM}, the width of a head, got {width}.")
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // HEAD_DIM}
    return {**sizes, "shared_adaln": depth == 36}


def _schedule(options: argparse.Namespace) -> None:
    from ..priors import VARConfig
    from ..priors.costs import var_costs

    schedules, transformer = _propose(options), _transformer(options)
    costs = [var_costs(VARConfig(patch_nums=entry.patch_nums, **transformer)) for entry in schedules]
    if options.json:
        found = [
            {"num_tokens": entry.num_tokens, "scale_lengths": entry.scale_lengths, **vars(entry), "costs": vars(cost)}
            for entry, cost in zip(schedules, costs, strict=True)
        ]
        print(json.dumps({"transformer": transformer, "schedules": found}, indent=2))
        return
    _print_proposal(options, schedules[0])
    _print_costs(schedules, costs, transformer)


def _print_proposal(options: argparse.Namespace, schedule: Schedule) -> None:
    sizes = scale_sizes(schedule.patch_nums)
    height, width = normalize_size("size", options.size * (3 - len(options.size)))
    print(f"{height}x{width} pixels, downsampling {options.downsampling}: a grid of {sizes[-1][0]}x{sizes[-1][1]}\n")
    print(f"patch_nums: {schedule.patch_nums}\n")
    print(f"Why: {schedule.reason}.")
    if height != width:
        print("Each map has the aspect ratio of the grid and about the area of the square one.")
    ratio = schedule.num_tokens / schedule.scale_lengths[-1]
    print(
        f"All maps together have {ratio:.2f} times the tokens of the last one; released schedules have 2.19 to 2.66.\n"
    )
    print(f"{'scale':>5} {'map':>9} {'tokens':>8} {'so far':>8}")
    rows = zip(sizes, schedule.scale_lengths, accumulate(schedule.scale_lengths), strict=True)
    for scale, ((rows_of_map, columns), length, total) in enumerate(rows, start=1):
        print(f"{scale:>5} {f'{rows_of_map}x{columns}':>9} {length:>8,} {total:>8,}")


def _print_costs(schedules: list[Schedule], costs: list[Any], transformer: dict[str, Any]) -> None:
    parameters = costs[0].num_parameters
    print(
        f"\nTransformer of {transformer['num_hidden_layers']} layers, {transformer['hidden_size']} wide: "
        f"{parameters / 1e6:,.1f} M parameters, {4 * parameters / 1e6:,.0f} MB in fp32 and {2 * parameters / 1e6:,.0f} MB in bf16."
    )
    print("For one image. Guidance doubles the cache and sampling; training is a forward and a backward pass.\n")
    print(f"{'':12} {'scales':>6} {'tokens':>9} {'KV cache, MB':^21} {'sampling, GFLOP':^21} {'training,':>12}")
    print(f"{'':29} {'bf16':>10} {'fp32':>10} {'products':>10} {'attention':>10} {'GFLOP':>12}")
    names = ["proposed"]
    names += [
        "fewer tokens" if entry.num_tokens < schedules[0].num_tokens else "more tokens" for entry in schedules[1:]
    ]
    for name, entry, cost in zip(names, schedules, costs, strict=True):
        flops = (cost.sampling_products, cost.sampling_attention, cost.training)
        products, attention, training = (count / 1e9 for count in flops)
        print(
            f"{name:12} {len(entry.patch_nums):>6} {entry.num_tokens:>9,} {2 * cost.num_cached / 1e6:>10,.2f} "
            f"{4 * cost.num_cached / 1e6:>10,.2f} {products:>10,.2f} {attention:>10,.2f} {training:>12,.2f}"
        )
    print()
    for name, entry in zip(names[1:], schedules[1:], strict=True):
        print(f"{name}: {entry.reason}\n  patch_nums: {entry.patch_nums}")
