# SPDX-License-Identifier: Apache-2.0
"""
Three steps of a transformer, whole in one process and in two processes that hold half of every parameter each (FSDP2).
What they end with is written to folders `1` and `2` of the folder given.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.metrics.likelihood import measure_likelihood
from hf_var.training.average import AveragedWeights, averaged_weights
from hf_var.training.checkpoints import Checkpoints
from hf_var.training.identity import RunIdentity
from hf_var.training.optimization import OptimizerConfig, make_optimizer
from hf_var.training.prior_inputs import prior_inputs
from hf_var.training.sharding import whole_model


PATCH_NUMS = (1, 2)
LENGTH = 5


def codes(seed: int, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=generator)
    return {"codes": torch.randint(16, (number, LENGTH), generator=generator), "class_labels": labels}


def train(folder: str) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, size = accelerator.process_index, accelerator.num_processes
    config = VARConfig(
        num_labels=3,
        codebook_size=16,
        latent_channels=4,
        patch_nums=PATCH_NUMS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        class_dropout_prob=0.0,
        drop_path_rate=0.0,
        initializer_head_factor=1.0,
        initializer_adaln_gamma_factor=1.0,
    )
    set_seed(0)
    vqvae = VQVAEModel(
        VQVAEConfig(
            in_channels=1,
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            norm_num_groups=4,
            latent_channels=4,
            codebook_size=16,
            patch_nums=PATCH_NUMS,
        )
    ).eval()
    set_seed(0)
    transformer = VARTransformer(config).train()
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        for layer in transformer.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(transformer, mesh=mesh)
    optimizer = make_optimizer(transformer, OptimizerConfig(learning_rate=1e-2))
    average = AveragedWeights(transformer, 0.5)
    make_inputs = partial(prior_inputs, vqvae)
    for step in range(3):
        # One process takes both batches of a step as one.
        numbers = [2 * step + rank] if size > 1 else [2 * step, 2 * step + 1]
        parts = [make_inputs(codes(number, 4)) for number in numbers]
        loss = transformer(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        average.step(transformer.parameters())
        if step == 1:
            # As if the run was stopped and resumed here.
            checkpoints = Checkpoints(accelerator, Path(folder) / f"run{size}", 1)
            checkpoints.save(step, {"model": transformer, "average": average}, RunIdentity({}, {}))
            # What is written is what was there before.
            with torch.no_grad():
                for tensor in [*transformer.parameters(), *average.shadow_params]:
                    tensor.zero_()
            checkpoints.finish()
            average = AveragedWeights(transformer, 0.5)
            newest = Path(folder) / f"run{size}/checkpoints/step-{step:08d}"
            checkpoints.load(newest, {"model": transformer, "average": average})
    # Three batches for two processes.
    validation = [codes(100 + number, 2) for number in range(3)][rank::size]
    with averaged_weights(average, transformer):
        figures = measure_likelihood(transformer, make_inputs, validation, accelerator)
        pipeline = VARPipeline(transformer=transformer, vqvae=vqvae)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline([0, 2], generator=torch.Generator().manual_seed(0)).codes
        # Of a run of more processes that was stopped while it wrote.
        leftovers = Path(folder) / ".unfinished-weights/sharded"
        if size > 1 and accelerator.is_main_process:
            leftovers.mkdir(parents=True)
            save_file(
                {"head.bias": torch.full((16,), 9.0)}, leftovers / "shard-00003-model-00001-of-00001.safetensors"
            )
        whole = whole_model(transformer, lambda: VARTransformer(config), folder)
        assert not leftovers.exists() or not accelerator.is_main_process
        output = Path(folder) / str(size)
        if accelerator.is_main_process:
            whole.save_pretrained(output)
    if accelerator.is_main_process:
        (output / "figures.json").write_text(json.dumps(figures | {"codes": drawn.flatten().tolist()}))
    accelerator.end_training()


if __name__ == "__main__":
    # Forks, which has to come before anything that starts threads.
    debug_launcher(train, (sys.argv[1],), num_processes=2)
    train(sys.argv[1])
