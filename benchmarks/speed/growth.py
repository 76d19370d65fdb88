# SPDX-License-Identifier: Apache-2.0
"""
How the time of an image grows with the token grid n x n, for VAR and for a decoder that samples token after token.

The paper (Tian et al. 2024, appendix, complexity analysis) has O(n^4) for VAR and O(n^6) for the raster decoder: it counts the
attention of all tokens that are there at every step. With keys and values kept, as everybody does, the raster decoder's
steps are many and small, and the exponents are smaller. All of these are fitted here: times, counted operations with the cache,
and counted attention without it.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from hf_var import VARCache, VARConfig, VARPipeline

from .clock import progress, timed
from .machine import block_flops, meta_transformer
from .models import make_transformer, make_vqvae
from .peers import draw_raster, make_raster


# Beginnings of the published schedules, whose last map is n x n: those for 256 pixels up to 16, beyond those for 512.
SCHEDULE_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCHEDULE_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
GRIDS = (4, 6, 8, 10, 13, 16, 24, 32)
SMOKE_GRIDS = (4, 6, 8)
# Small, so that the whole raster image fits into seconds.
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_labels": 10}
SMOKE_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10}
TOKENIZER = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
TOP_K, TOP_P = 900, 0.96


@dataclass(frozen=True)
class Curve:
    """
    A quantity against the grid.

    Args:
        name (`str`): What it is.
        values (`dict[int, float]`): For each grid.
        published (`int`, *optional*): Exponent that the paper gives for it.
    """

    name: str
    values: dict[int, float]
    published: int | None = None

    def exponent(self, last: int | None = None) -> float:
        """Slope of the line through the logarithms of all points, or of the `last` ones."""
        points = sorted(self.values.items())[-last if last else None :]
        grids, values = zip(*points, strict=True)
        return float(np.polyfit(np.log(grids), np.log(values), 1)[0])

    def report(self) -> dict:
        """For the JSON file."""
        return {
            "name": self.name,
            "values": self.values,
            "exponent": self.exponent(),
            "exponent_of_the_largest_three": self.exponent(3),
            "published": self.published,
        }


def schedule(grid: int) -> tuple[int, ...]:
    """The published schedule that has a map of `grid` x `grid`, up to there."""
    whole = SCHEDULE_256 if grid in SCHEDULE_256 else SCHEDULE_512
    return whole[: whole.index(grid) + 1]


def measure_growth(device: torch.device, rounds: int, smoke: bool = False) -> list[Curve]:
    """Time and count images without their decoder and without guidance, in fp32."""
    grids, sizes = (SMOKE_GRIDS, SMOKE_SIZES) if smoke else (GRIDS, SIZES)
    codebook_size = 64 if smoke else 4096
    names = (
        "VAR, time",
        "raster, time",
        "VAR, operations",
        "raster, operations",
        "VAR, attention",
        "raster, attention",
    )
    values: dict[str, dict[int, float]] = {name: {} for name in names}
    for grid in grids:
        progress(f"growth: grid {grid}")
        fields = {**sizes, "patch_nums": schedule(grid), "codebook_size": codebook_size}
        transformer = make_transformer(fields, device=device)
        vqvae = make_vqvae({**TOKENIZER, "patch_nums": schedule(grid), "codebook_size": codebook_size}, device=device)
        pipe = VARPipeline(transformer, vqvae)
        pipe.set_progress_bar_config(disable=True)
        raster = make_raster(fields, transformer)
        labels = torch.zeros(1, dtype=torch.long, device=device)

        def draw_var(pipe: VARPipeline = pipe) -> object:
            generator = torch.Generator(device).manual_seed(0)
            return pipe(0, guidance_scale=1, top_p=TOP_P, generator=generator, output_type="latent")

        def draw_tokens(raster=raster, vqvae=vqvae, labels=labels) -> object:
            generator = torch.Generator(device).manual_seed(0)
            return draw_raster(raster, vqvae, labels, 1, min(TOP_K, codebook_size), TOP_P, generator)

        # The fastest: what is asked for is how the work grows, and whatever else the machine did only adds to it.
        times = [(timed(draw_var, device)[0], timed(draw_tokens, device)[0]) for _ in range(rounds + 1)]
        values["VAR, time"][grid] = min(time for time, _ in times)
        values["raster, time"][grid] = min(time for _, time in times)
        values["VAR, operations"][grid] = var_flops(transformer.config)
        values["raster, operations"][grid] = raster_flops(raster.config)
        for name, config in (("VAR, attention", transformer.config), ("raster, attention", raster.config)):
            ends = accumulate(config.block_lengths)
            # Two products of all tokens with all tokens, in every layer.
            values[name][grid] = sum(4.0 * config.num_hidden_layers * config.hidden_size * end**2 for end in ends)
    published = {"VAR, attention": 4, "raster, attention": 6}
    return [Curve(name, points, published.get(name)) for name, points in values.items()]


def var_flops(config: VARConfig) -> float:
    """Operations of an image, scale by scale with a cache."""
    transformer = meta_transformer(config)
    cache = VARCache(transformer.config)
    return sum(block_flops(transformer, cache, 1, length) for length in config.block_lengths)


def raster_flops(config: VARConfig) -> float:
    """The same token by token. From the second on they grow linearly with the cache, so that two of them tell all."""
    transformer, count = meta_transformer(config), config.length
    cache = VARCache(transformer.config)
    first = block_flops(transformer, cache, 1, 1)
    second = block_flops(transformer, cache, 1, 1)
    third = block_flops(transformer, cache, 1, 1)
    growth = third - second
    return first + (count - 1) * second + growth * (count - 1) * (count - 2) / 2


def table(curves: list[Curve]) -> str:
    """A Markdown table of the exponents."""
    lines = ["| quantity | exponent, all grids | exponent, largest three | paper |", "|---|---|---|---|"]
    for curve in curves:
        published = "" if curve.published is None else str(curve.published)
        lines.append(f"| {curve.name} | {curve.exponent():.2f} | {curve.exponent(3):.2f} | {published} |")
    return "\n".join(lines)
