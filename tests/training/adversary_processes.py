# SPDX-License-Identifier: Apache-2.0
"""
Three steps of both players, in one process that accumulates two batches and in two processes with one batch each. What
they have learned is written to `1.pt` and `2.pt` in the folder given.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from torch import nn

from hf_var.training.adversary import Adversary, AdversaryConfig
from hf_var.training.discriminators import make_discriminator
from hf_var.training.losses import reconstruction_loss


def train(folder: str, num_batches: int) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=num_batches)
    torch.manual_seed(0)
    decoder, network = nn.Conv2d(3, 3, 3, padding=1), make_discriminator("stylegan", 3, (8, 8), 4, base_channels=8)
    model, discriminator = accelerator.prepare(decoder, network)
    config = AdversaryConfig(
        adversarial_weight=0.8,
        discriminator_start=1,
        discriminator_ramp_steps=2,
        r1_weight=1.0,
        lecam_weight=0.5,
        diffaugment=["color", "translation"],
    )
    adversary = Adversary(config, discriminator)
    optimizer = torch.optim.SGD([*model.parameters(), *discriminator.parameters()], lr=0.1)
    for step in range(4):
        for batch in range(num_batches):
            position = step * 2 + batch + accelerator.process_index
            target = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(position)) * 2 - 1
            with accelerator.accumulate(model, discriminator):
                sample = model(target)
                reconstruction = reconstruction_loss(sample, target, 0.0, 1.0)
                loss, _ = adversary.generator_loss(sample, reconstruction, decoder.weight, step, position)
                accelerator.backward(reconstruction + loss)
                loss, _ = adversary.discriminator_loss(target, sample, position)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    optimizer.step()
                    optimizer.zero_grad()
        adversary.finish_step()
    if accelerator.is_main_process:
        averages = adversary.state_dict()["lecam_averages"]
        learned = dict(network.state_dict(), lecam_averages=averages, last_layer=decoder.weight.detach())
        torch.save(learned, Path(folder) / f"{accelerator.num_processes}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    # Forks, which has to come before anything that starts threads.
    debug_launcher(train, (sys.argv[1], 1), num_processes=2)
    train(sys.argv[1], 2)
