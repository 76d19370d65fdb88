# SPDX-License-Identifier: Apache-2.0
"""
What the large trainings would take, on paper: `python benchmarks/plan.py` prints the tables of docs/scale.md.

FLOPs, tokens and parameters are counted from the recipes of examples/, bytes are those that were measured with small runs
(CONSTANTS below), and the rates of GPUs are assumptions, since none was at hand.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_var import TextVARConfig, TextVARTransformer, VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.cli.arguments import given_fields
from hf_var.priors.costs import training_flops


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import train_var


RECIPES = Path(train_var.__file__).with_name("recipes")
IMAGENET_IMAGES = 1_281_167
# The recipes name what a process takes; their batches are those of eight.
PROCESSES = 8

# Measured. Codes of a codebook of 4,096 in parquet, per code; weights, two moments and the average in fp32, per parameter.
BYTES_PER_CODE = 1.507
CHECKPOINT_BYTES = 16
# float16, as they are stored: CLIP-L and OpenCLIP-bigG side by side, and the vector of the whole text.
TEXT_BYTES_PER_TOKEN, TEXT_BYTES = 2 * 2048, 2 * 1280
# A core decodes, resizes and crops so many JPEGs of 500x375 pixels in a second.
DECODED_PER_CORE = 300

# Assumed. The share is the only published one: VAR-d16 took 2.5 days of 16 A100 for 200 epochs (its repository, issue 137).
PEAKS = {"A100": 312e12, "H100": 989e12}
TRAINING_SHARE = 0.22
ENCODING_SHARE = 0.3
TOKENS_PER_CAPTION = 25
COPIES = 10


@dataclass(frozen=True)
class Job:
    """A training: its transformer, the images that it sees, and those that are tokenized once."""

    name: str
    config: VARConfig | TextVARConfig
    images_seen: int
    images_stored: int
    image_size: int
    images_per_step: int
    batches_per_step: int

    @cached_property
    def num_parameters(self) -> int:
        """Weights of the transformer."""
        model_class = VARTransformer if isinstance(self.config, VARConfig) else TextVARTransformer
        with torch.device("meta"):
            return model_class(self.config).num_parameters()

    @cached_property
    def flops_per_image(self) -> float:
        """Of a forward and a backward pass."""
        return training_flops(self.config)

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.flops_per_image * self.images_seen


def imagenet_job(depth: str, size: int) -> Job:
    """The job of a recipe."""
    args = train_var.read_arguments([str(RECIPES / f"var_{depth}_{size}.yaml")])
    batches = args.run.gradient_accumulation_steps
    batch = args.data.train_batch_size * batches
    config = VARConfig(num_labels=1000, **given_fields(args.model))
    images_seen = args.run.max_train_steps * PROCESSES * batch
    return Job(f"VAR-{depth}", config, images_seen, COPIES * IMAGENET_IMAGES, size, batch, batches)


def text_job() -> Job:
    """A model of Switti's size at 512x512 pixels, three passes over 100 million images."""
    return Job("text to image", TextVARConfig(), 300_000_000, 100_000_000, 512, images_per_step=16, batches_per_step=1)


def encoding_flops(size: int) -> float:
    """FLOPs of the released encoder for an image."""
    with torch.device("meta"), torch.no_grad():
        encoder = VQVAEModel(VQVAEConfig()).encoder.eval()
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def training_table(jobs: list[Job]) -> list[str]:
    """Rows of Markdown."""
    lines = ["| | parameters, B | tokens | images seen, M | FLOPs | A100 hours | H100 hours | checkpoint, GB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for job in jobs:
        hours = [f"{job.flops / (TRAINING_SHARE * peak) / 3600:,.0f}" for peak in PEAKS.values()]
        checkpoint = CHECKPOINT_BYTES * job.num_parameters / 1e9
        lines.append(
            f"| {job.name}, {job.image_size} px | {job.num_parameters / 1e9:.2f} | {job.config.length:,} | "
            f"{job.images_seen / 1e6:,.0f} | {job.flops:.1e} | {' | '.join(hours)} | {checkpoint:,.0f} |"
        )
    return lines


def data_table(jobs: list[Job]) -> list[str]:
    """Rows of Markdown."""
    lines = [
        "| | images stored, M | codes, GB | embeddings of captions, GB | H100 hours to encode | core hours to decode |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for job in jobs:
        codes = BYTES_PER_CODE * job.config.length * job.images_stored / 1e9
        per_text = TEXT_BYTES_PER_TOKEN * TOKENS_PER_CAPTION + TEXT_BYTES
        texts = f"{per_text * job.images_stored / 1e9:,.0f}" if isinstance(job.config, TextVARConfig) else ""
        encode = encoding_flops(job.image_size) * job.images_stored / (ENCODING_SHARE * PEAKS["H100"]) / 3600
        decode = job.images_stored / DECODED_PER_CORE / 3600
        lines.append(
            f"| {job.name}, {job.image_size} px | {job.images_stored / 1e6:,.1f} | {codes:,.0f} | {texts} | {encode:,.0f} | "
            f"{decode:,.0f} |"
        )
    return lines


def network_table(jobs: list[Job]) -> list[str]:
    """Rows of Markdown."""
    lines = ["| | images a step and GPU | in batches | a step of an H100, s | DDP, GB | GB/s | FSDP2, GB | GB/s |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for job in jobs:
        seconds = job.flops_per_image * job.images_per_step / (TRAINING_SHARE * PEAKS["H100"])
        # A ring sends and receives fp32 gradients nearly twice, once a step. FSDP2 gathers weights in half precision twice for
        # every batch, and reduces the gradients once.
        ddp, fsdp = (size * job.num_parameters / 1e9 for size in (2 * 4, 2 * 2 * job.batches_per_step + 4))
        lines.append(
            f"| {job.name}, {job.image_size} px | {job.images_per_step} | {job.batches_per_step} | {seconds:.1f} | {ddp:.1f} | "
            f"{ddp / seconds:.0f} | {fsdp:.1f} | {fsdp / seconds:.0f} |"
        )
    return lines


def main() -> None:
    jobs = [imagenet_job("d16", 256), imagenet_job("d20", 256), imagenet_job("d24", 256), imagenet_job("d30", 256)]
    jobs += [imagenet_job("d36", 512), text_job()]
    stored = [jobs[0], *jobs[-2:]]
    print("\n\n".join("\n".join(rows) for rows in (training_table(jobs), data_table(stored), network_table(jobs))))


if __name__ == "__main__":
    main()
