# SPDX-License-Identifier: Apache-2.0
"""
What a code costs when a PixelCNN or PixelSNAIL is sampled, and how the cost grows with the map: by the pipeline's predictor,
which keeps what finished rows have computed, against the loop of the public code, which runs the network on all rows so far.

    python benchmarks/pixel_sampling.py --maps 8 16 32

Both choose the most likely code, and must choose the same ones. Rows are those that the network computes for a map. Of large
maps only some rows of the loop are run, spread over the map; the others are taken to cost what their neighbours do.
"""

import argparse
import time

import torch

from hf_var import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig
from hf_var.pipelines.raster import LevelsPredictor, RasterOrder


CODES = 128
SIZES = {"codebook_size": CODES, "hidden_size": 64}
SNAIL = {**SIZES, "residual_size": 64, "kernel_size": 3, "num_blocks": 2, "num_res_blocks": 2}
MODELS = {
    "PixelCNN": lambda side: PixelCNN(PixelCNNConfig(map_size=side, num_hidden_layers=8, **SIZES)),
    "PixelSNAIL": lambda side: PixelSNAIL(PixelSNAILConfig(map_size=side, attention=False, **SNAIL)),
    "PixelSNAIL, attention": lambda side: PixelSNAIL(PixelSNAILConfig(map_size=side, **SNAIL)),
}


def cached(model, side: int, batch_size: int) -> tuple[torch.Tensor, float, int]:
    """Codes, seconds and rows of the pipeline's predictor."""
    predictor = LevelsPredictor([model], RasterOrder([(side, side)]), [{}])
    codes, begin = torch.zeros(batch_size, side * side, dtype=torch.long), time.perf_counter()
    for number in range(side * side):
        codes[:, number] = predictor.logits(codes, number, 1.0)[:, 0].argmax(-1)
    # Every row again for each of its codes, and once more when it is finished.
    return codes, time.perf_counter() - begin, side * (side + 1) - 1


def naive(model, codes: torch.Tensor, side: int, measured: list[int]) -> tuple[float, int]:
    """Seconds and rows of the loop, which must find `codes` as well."""
    seconds = 0.0
    for row in measured:
        begin = time.perf_counter()
        for column in range(side):
            place = row * side + column
            logits = model(codes[:, : (row + 1) * side]).logits[:, place]
            assert logits.argmax(-1).equal(codes[:, place])
        seconds += time.perf_counter() - begin
    return seconds * side / len(measured), side * side * (side + 1) // 2


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, nargs="+", default=[8, 16, 32], help="sides of the maps")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows of the loop that are run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| prior | map | rows, loop | rows, pipeline | ms per code, loop | ms per code, pipeline | times |")
    print("|---|---|---|---|---|---|---|")
    for name, make in MODELS.items():
        for side in args.maps:
            model = make(side).eval()
            model(torch.zeros(args.batch_size, side, dtype=torch.long))  # what a first call costs
            codes, fast, fast_rows = cached(model, side, args.batch_size)
            # Equally many before and behind the middle, so that their mean is that of the map.
            measured = sorted({round((index + 0.5) * side / args.rows - 0.5) for index in range(min(args.rows, side))})
            slow, slow_rows = naive(model, codes, side, measured)
            times = [1000 * seconds / side**2 for seconds in (slow, fast)]
            print(
                f"| {name} | {side}x{side} | {slow_rows} | {fast_rows} | {times[0]:.1f} | {times[1]:.1f} | "
                f"{slow / fast:.1f} |"
            )


if __name__ == "__main__":
    main()
