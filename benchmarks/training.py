# SPDX-License-Identifier: Apache-2.0
"""
How long a training step takes: ours beside the published algorithm in plain form (a dense additive mask, AdamW parameter by
parameter), in one run and in turns.

    python benchmarks/training.py --model d16 --batch_size 1

A step makes the inputs of all scales from codes, runs the transformer forward and backward and AdamW; `_images` variants
begin with images, which the tokenizer encodes in fp32 first. `_bf16` is autocast over fp32 weights, `_compiled` compiles layer
by layer. The learning rate is 0, which costs the same and lets all variants compute the same loss in all rounds; there is no
dropout of any kind. `_onednn`: see sampling.py.
The floor is the arithmetic of the matrix products at the measured rate: its share is the utilisation of the machine.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from speed.clock import Timed, alternate, available, progress, timed
from speed.machine import as_report, describe, dtype_name, measure_limits
from speed.models import (
    calibrate,
    make_transformer,
    make_vqvae,
    onednn_matmul,
    random_images,
    transformer_fields,
    vqvae_fields,
)
from speed.plain_var import PlainVAR
from speed.plain_vqvae import PlainVQVAE
from speed.report import (
    LOSS_COLUMN,
    TOKENS_COLUMN,
    arguments_of,
    choose,
    is_half,
    machine_text,
    make_parser,
    make_rows,
    prepare,
    table,
    write,
)

from hf_var.priors.costs import training_flops


EAGER = ["plain", "plain_onednn", "plain_bf16", "plain_images", "ours", "ours_onednn", "ours_bf16"]
EAGER += ["ours_images", "ours_onednn_images", "ours_bf16_images"]
COMPILED = ["ours_compiled", "ours_bf16_compiled"]
BASELINE, IMAGES_BASELINE = "plain", "plain_images"


class Steps:
    """
    Makes the variants. All of ours share weights and optimizer, and so do all plain ones.

    Args:
        model (`str`): Size of the transformer.
        device (`torch.device`): Where.
        batch_size (`int`): Images of a step.
    """

    def __init__(self, model: str, device: torch.device, batch_size: int):
        self.device = device
        self.transformer = make_transformer(transformer_fields(model), device=device).train()
        # As train_var.py does.
        self.transformer.set_attn_implementation("blockwise_sdpa")
        self.vqvae: Any = make_vqvae(vqvae_fields(model), device=device).requires_grad_(False)
        calibrate(self.vqvae)
        self.plain_vqvae = PlainVQVAE(self.vqvae)
        self.images = random_images(self.vqvae, batch_size)
        self.labels = torch.arange(batch_size, device=device) % (self.transformer.config.num_labels or 1)
        with torch.no_grad():
            self.codes = self.vqvae.encode(self.images).codes
        self.optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=0.0, fused=True)
        self.plain: PlainVAR | None = None
        self.compiled: torch.nn.Module | None = None

    def make(self, name: str) -> Callable[[], Timed]:
        """A measurement of one step of the variant `name`."""
        from_images = name.endswith("_images")
        if name.startswith("plain"):
            loss, optimizer = self._plain_loss(from_images)
        else:
            loss, optimizer = self._loss(from_images, "compiled" in name), self.optimizer

        def step() -> float:
            with onednn_matmul("onednn" in name):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half(name)):
                    value = loss()
                value.backward()
                optimizer.step()
                optimizer.zero_grad()
            return value.item()

        def measure() -> Timed:
            seconds, value = timed(step, self.device)
            return Timed(seconds, loss=value)

        return measure

    def _loss(self, from_images: bool, compiled: bool) -> Callable[[], torch.Tensor]:
        transformer = self._compiled() if compiled else self.transformer

        def loss() -> torch.Tensor:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                codes = self.vqvae.encode(self.images).codes if from_images else self.codes
                scale_inputs = self.vqvae.teacher_forcing(codes)
            return transformer(self.labels, scale_inputs=scale_inputs, labels=codes).loss

        return loss

    def _plain_loss(self, from_images: bool) -> tuple[Callable[[], torch.Tensor], torch.optim.Optimizer]:
        if self.plain is None:
            self.plain = PlainVAR(self.transformer, trainable=True)
            # Not fused, otherwise as torch has it.
            self.plain_optimizer = torch.optim.AdamW(self.plain.parameters(), lr=0.0)
        plain = self.plain

        def loss() -> torch.Tensor:
            with torch.autocast(self.device.type, enabled=False):
                codes = self.plain_vqvae.encode(self.images) if from_images else self.codes
                scale_inputs = self.plain_vqvae.teacher_forcing(codes)
            return plain.training_loss(self.labels, scale_inputs, codes)

        return loss, self.plain_optimizer

    def _compiled(self) -> torch.nn.Module:
        """A twin with the same parameters, whose layers are compiled one by one: they are alike, so that one serves all."""
        if self.compiled is None:
            shared = {id(parameter): parameter for parameter in self.transformer.parameters()}
            self.compiled = copy.deepcopy(self.transformer, shared)
            for layer in self.compiled.layers:
                layer.compile()
        return self.compiled


def main(argv: list[str] | None = None) -> dict:
    known = EAGER + COMPILED
    parser = make_parser(__doc__, known)
    parser.add_argument("--batch_size", type=int, help="images of a step; default: 1 on a CPU, else 16")
    args = prepare(parser, argv)
    batch_size = args.batch_size or (2 if args.smoke else 1 if args.device.type == "cpu" else 16)
    names = choose(args, EAGER if args.smoke else known, known)
    limits = measure_limits(args.device, [torch.float32, torch.bfloat16], quick=args.smoke)
    steps = Steps(args.model, args.device, batch_size)
    variants, skipped = available({name: lambda name=name: steps.make(name) for name in names})
    series = alternate(variants, args.rounds)
    config = steps.transformer.config
    flops = training_flops(config) * batch_size
    floors = {
        name: flops / limits.flops[dtype_name(torch.bfloat16 if is_half(name) else torch.float32)]
        for name in variants
        if not name.endswith("_images")
    }
    baseline = BASELINE if BASELINE in series else next(iter(series))
    rows = make_rows(series, baseline, batch_size, floors, baseline)
    for row in rows:
        row["loss"] = series[row["variant"]].loss
        row["tokens_per_second"] = batch_size * config.length / row["median"]
    # What it is worth to encode the images once, before the training.
    from_codes = {}
    if IMAGES_BASELINE in series:
        from_codes = {name: own.ratios(series[IMAGES_BASELINE]) for name, own in series.items()}
    report = {
        "job": "training",
        "machine": describe(args.device),
        "limits": as_report(limits),
        "arguments": arguments_of(args),
        "flops_per_step": flops,
        "rows": rows,
        "against_images": from_codes,
        "skipped": skipped,
    }
    print(f"Training, {args.model}. {machine_text(report['machine'], report['limits'])}\n")
    print(table(rows, baseline, [TOKENS_COLUMN, LOSS_COLUMN]))
    if from_codes:
        ratios = ", ".join(f"{name} {ratio['ratio']:.2f}" for name, ratio in from_codes.items())
        print(f"\nTimes {IMAGES_BASELINE}: {ratios}")
    progress(f"wrote {write(args.output_dir, f'training_{args.model}', report)}")
    return report


if __name__ == "__main__":
    main()
