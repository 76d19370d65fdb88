# SPDX-License-Identifier: Apache-2.0
"""
A good start for the codebook and a second life for codes that nobody uses.

Without them a tokenizer trained from scratch settles on a few codes per scale: an untrained encoder's features lie close
together, the few codes nearest to them take all gradients, and the rest are never chosen again.
"""

from typing import cast

import torch
from accelerate.utils import broadcast, reduce
from torch import nn
from torch.nn import functional

from ..autoencoders import VQVAEModel, VQVAEOutput


class VQVAEWarmup(nn.Module):
    """
    A tokenizer whose `forward` can leave the quantizer out, as if the codebook were infinitely fine. Both ways are one
    `forward`, because that is what distributed training watches.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
    """

    def __init__(self, vqvae: VQVAEModel):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> VQVAEOutput:
        """Output of [`VQVAEModel`], without codes unless `quantize`."""
        if quantize:
            return self.vqvae(pixel_values)
        features = self.vqvae.quant_conv(self.vqvae.encoder(pixel_values))
        sample = self.vqvae.decoder(self.vqvae.post_quant_conv(features))
        # Distributed training waits for a gradient of every parameter, the unused quantizer's included.
        unused = torch.stack([parameter.sum() for parameter in self.vqvae.quantizer.parameters()])
        return VQVAEOutput(loss=cast(torch.FloatTensor, unused.sum() * 0.0), sample=sample, features=features)


@torch.no_grad()
def quantizer_inputs(
    vqvae: VQVAEModel, features: torch.Tensor, codes: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """
    The vectors that the quantizer looks up at each scale.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer.
        features (`torch.FloatTensor` of shape `(batch, latent_channels, height, width)`): The encoder's output.
        codes (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            The codes of `features`. Without them every scale is taken to be coded without error, so that the later
            scales see what an infinitely fine codebook would leave.

    Returns:
        `list[torch.Tensor]`: For every scale a `(batch * length of the scale, latent_channels)` tensor.
    """
    features = features.float()
    latents, begin, inputs = None, 0, []
    for scale, (height, width) in enumerate(vqvae.config.scale_sizes):
        residual = features if latents is None else features - latents
        if (height, width) != tuple(features.shape[-2:]):
            residual = functional.interpolate(residual, size=(height, width), mode="area")
        vectors = residual.flatten(2).transpose(1, 2)  # (batch, length of scale, latent_channels)
        inputs.append(vectors.flatten(0, 1))
        end = begin + height * width
        latents, _ = vqvae.next_scale(latents, vectors if codes is None else codes[:, begin:end], scale)
        begin = end
    return inputs


@torch.no_grad()
def initialize_codebook(
    vqvae: VQVAEModel, pixel_values: torch.Tensor, seed: int, rounds: int = 3, vectors_per_scale: int = 8192
) -> None:
    """
    Set the codes to k-means centres of what the quantizer looks up, equally many vectors from each scale.

    What a scale looks up depends on the codes of the scales before it: the first round takes those to be exact, every
    further round starts from the codes so far and looks at the residuals that they really leave.

    Args:
        vqvae ([`VQVAEModel`]): The tokenizer, changed in place.
        pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`): Images to learn from.
        seed (`int`): Seed of the choice of vectors and of k-means.
        rounds (`int`, *optional*, defaults to 3): Runs of k-means.
        vectors_per_scale (`int`, *optional*, defaults to 8192): At most so many vectors of each scale are used.

    Raises:
        `ValueError`: If the images give fewer vectors than there are codes.
    """
    from sklearn.cluster import KMeans

    weight = vqvae.quantizer.codebook.weight
    generator = torch.Generator().manual_seed(seed)
    centers = None
    for _ in range(rounds):
        batches = cast(tuple[torch.FloatTensor, ...], pixel_values.split(256))
        encoded = [vqvae.encode(batch, return_dict=False) for batch in batches]
        features, _, codes = (torch.cat(tensors) for tensors in zip(*encoded, strict=True))
        inputs = [vectors.cpu() for vectors in quantizer_inputs(vqvae, features, None if centers is None else codes)]
        sample = torch.cat([_choose(vectors, vectors_per_scale, generator) for vectors in inputs])
        if len(sample) < len(weight):
            raise ValueError(
                f"{len(pixel_values)} images give {len(sample)} vectors, too few for a k-means start of `codebook_size` = "
                f"{len(weight)} codes."
            )
        means = KMeans(
            n_clusters=len(weight),
            init="k-means++" if centers is None else centers,
            n_init=1,  # pyright: ignore[reportArgumentType]
            max_iter=20,
            random_state=seed,
        )
        centers = means.fit(sample.numpy()).cluster_centers_
        weight.copy_(broadcast(torch.from_numpy(centers).to(weight)))


class DeadCodes:
    """
    Counts how often codes are chosen and moves those that are hardly chosen to vectors that are looked up right now.

    Args:
        codebook_size (`int`): Number of codes.
        threshold (`float`, *optional*, defaults to 0.03):
            A code is dead if it was chosen less than this many times as often as the average code.
    """

    def __init__(self, codebook_size: int, threshold: float = 0.03):
        self.threshold = threshold
        self.hits = torch.zeros(codebook_size, dtype=torch.long)

    def count(self, codes: torch.Tensor) -> None:
        """Count the codes of a batch."""
        # Where the codes are, so that no step waits for the device.
        self.hits = self.hits.to(codes.device) + torch.bincount(codes.flatten(), minlength=len(self.hits))

    @torch.no_grad()
    def restart(self, vqvae: VQVAEModel, features: torch.Tensor, codes: torch.Tensor, seed: int) -> torch.Tensor:
        """
        Move the dead codes to random vectors of a batch and begin to count anew.

        Returns:
            `torch.LongTensor`: The codes that moved.
        """
        weight = vqvae.quantizer.codebook.weight
        hits = cast(torch.Tensor, reduce(self.hits.to(weight.device), reduction="sum"))
        dead = (hits < self.threshold * hits.float().mean()).nonzero().flatten()
        if len(dead) > 0:
            candidates = torch.cat(quantizer_inputs(vqvae, features, codes))
            chosen = torch.randint(len(candidates), (len(dead),), generator=torch.Generator().manual_seed(seed))
            weight[dead] = cast(torch.Tensor, broadcast(candidates[chosen.to(candidates.device)].to(weight)))
        self.hits.zero_()
        return dead

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For Accelerate's checkpoints."""
        return {"hits": self.hits}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """For Accelerate's checkpoints."""
        self.hits.copy_(state_dict["hits"])


def _choose(vectors: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    return vectors[torch.randperm(len(vectors), generator=generator)[:number]]
