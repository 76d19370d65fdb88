# SPDX-License-Identifier: Apache-2.0
"""The training steps that `training.py` compares, by name."""

import copy
from collections.abc import Callable
from typing import Any

import torch

from .clock import Timed, timed
from .models import (
    calibrate,
    make_transformer,
    make_vqvae,
    onednn_matmul,
    random_images,
    transformer_fields,
    vqvae_fields,
)
from .plain_var import PlainVAR
from .plain_vqvae import PlainVQVAE
from .report import is_half


class Steps:
    """
    Makes the variants. All of ours share weights and optimizer, and so do all plain ones.

    Args:
        model (`str`): Size of the transformer.
        device (`torch.device`): Where.
        batch_size (`int`): Images of a step.
        backend (`str`, *optional*, defaults to `"inductor"`): What compiles.
    """

    def __init__(self, model: str, device: torch.device, batch_size: int, backend: str = "inductor"):
        self.device, self.backend = device, backend
        self.transformer = make_transformer(transformer_fields(model), device=device).train()
        # As train_var.py does.
        self.transformer.set_attn_implementation("blockwise_sdpa")
        self.vqvae: Any = make_vqvae(vqvae_fields(model), device=device).requires_grad_(False)
        calibrate(self.vqvae)
        self.plain_vqvae = PlainVQVAE(self.vqvae)
        self.images = random_images(self.vqvae, batch_size)
        self.labels = torch.arange(batch_size, device=device) % (self.transformer.config.num_labels or 1)
        with torch.no_grad():
            # Encoding the batch of a large GPU at once needs more memory than a step.
            self.codes = torch.cat([self.vqvae.encode(images).codes for images in self.images.split(32)])
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
                layer.compile(backend=self.backend)
        return self.compiled
