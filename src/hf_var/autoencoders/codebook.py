# SPDX-License-Identifier: Apache-2.0
"""The interface of codebooks, search and look-up of code vectors, and the learned codebook."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init

from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .configuration_vqvae import VQVAEConfig


class Float32Weights(nn.Module):
    """
    Weights that `.to(dtype)`, `.half()` and `.bfloat16()` move but do not round: rounded codes would be other codes.
    (transformers keeps the quantizer in fp32 while loading, but not afterwards.) Subclasses create them in fp32, whatever
    torch's default is.
    """

    def _apply(self, fn, recurse=True):
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        return super()._apply(move_only, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args) -> None:
        # `load_state_dict(..., assign=True)` would take over the file's type.
        own = {
            name: value.float()
            for name, value in state_dict.items()
            if name.startswith(prefix) and isinstance(value, torch.Tensor)
        }
        super()._load_from_state_dict({**state_dict, **own}, prefix, *args)


class CodeWeights(Float32Weights):
    """A module of the quantizer that knows the initial values of its own weights and buffers."""

    def init_weights(self) -> None:
        """Set them, except those that transformers has loaded, which its functions leave unchanged."""
        raise NotImplementedError


class BaseCodebook(CodeWeights):
    """
    The code vectors of a quantizer, `codebook_size` times `latent_channels`, in fp32.

    Search and look-up are both `forward`, because offloading hooks bring the weights to the device there only: integer
    inputs are codes and give their vectors `(..., latent_channels)`; floating-point inputs are vectors
    `(..., latent_channels)` and give the codes `(...)` of those nearest to them, int64 in `[0, codebook_size)`.

    What follows is for quantizers whose vectors are not weights (`VQVAEConfig.has_trainable_codes`) or depend on the scale.
    """

    running_hits: torch.Tensor

    def count_hits(self, config: VQVAEConfig | HierarchicalVQVAEConfig) -> None:
        """Make room for the running average of how often each scale uses each code in training; saved with the weights."""
        num_scales = len(config.patch_nums) // config.num_codebooks
        hits = torch.zeros(num_scales, config.codebook_size, dtype=torch.float32)
        self.register_buffer("running_hits", hits)

    def init_weights(self) -> None:
        init.zeros_(self.running_hits)

    def bound(self, features: torch.Tensor) -> torch.Tensor:
        """The encoder's output `(batch, latent_channels, height, width)`, in the range that the codes cover."""
        return features

    def extent(self, scale: int, device: torch.device) -> torch.Tensor | None:
        """What the code vectors are multiplied by at `scale`, `(latent_channels,)`; `None` stands for one."""
        return None

    def straight_through(self, found: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """`found`, the vectors of the codes of `vectors`, with the gradient of the search, if that has one."""
        return found

    @property
    def vectors(self) -> torch.Tensor:
        """All code vectors, `(codebook_size, latent_channels)`."""
        return self(torch.arange(self.running_hits.shape[1], device=self.running_hits.device))

    def set_vectors(self, vectors: torch.Tensor, codes: torch.Tensor | None = None) -> None:
        """Replace the vectors of `codes`, of all if `None`, by `vectors`."""
        raise ValueError(f"The code vectors of {type(self).__name__} are fixed.")


def similarity(vectors: torch.Tensor, code_vectors: torch.Tensor, normalize: bool) -> torch.Tensor:
    """
    Minus half the squared distances of `(number, channels)` vectors to `(codes, channels)` code vectors, up to a
    number for each vector: `(number, codes)`, largest for the nearest. With `normalize` all vectors have unit length
    (cosine).
    """
    if normalize:
        return functional.normalize(vectors, dim=-1) @ functional.normalize(code_vectors, dim=-1).T
    # Without the vector's own square, which is the same for all codes.
    return torch.addmm(code_vectors.square().sum(dim=-1), vectors, code_vectors.T, beta=-0.5)


class Codebook(BaseCodebook, nn.Embedding):
    """Vectors that are weights (van den Oord et al. 2017), found by Euclidean or cosine distance."""

    def __init__(self, config: VQVAEConfig | HierarchicalVQVAEConfig):
        super().__init__(config.codebook_size, config.latent_channels, dtype=torch.float32)
        self.normalize = config.normalize_codebook
        self.count_hits(config)

    def init_weights(self) -> None:
        # As in VQ-VAE; small against the features, so that no code is favoured at the start.
        limit = 1 / self.num_embeddings
        init.uniform_(self.weight, -limit, limit)
        super().init_weights()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not inputs.is_floating_point():
            return super().forward(inputs)
        found = similarity(inputs.flatten(0, -2), self.weight, self.normalize).argmax(dim=-1)
        return found.view(inputs.shape[:-1])

    @property
    def vectors(self) -> torch.Tensor:
        """The weights themselves, `(codebook_size, latent_channels)`."""
        return self.weight

    @torch.no_grad()
    def set_vectors(self, vectors: torch.Tensor, codes: torch.Tensor | None = None) -> None:
        chosen = slice(None) if codes is None else codes
        self.weight[chosen] = vectors.to(self.weight)


class AveragedCodebook(Codebook):
    """
    A codebook with the averages that a training by moving averages ends with: of how many vectors choose each code
    (`average_hits`) and of their sum (`average_sums`). Both are zero after any other training.
    """

    average_hits: torch.Tensor
    average_sums: torch.Tensor

    def __init__(self, config: VQVAEConfig | HierarchicalVQVAEConfig):
        super().__init__(config)
        self.register_buffer("average_hits", torch.zeros(config.codebook_size, dtype=torch.float32))
        self.register_buffer("average_sums", torch.zeros_like(self.weight))

    def init_weights(self) -> None:
        super().init_weights()
        init.zeros_(self.average_hits)
        init.zeros_(self.average_sums)

    @property
    def has_averages(self) -> bool:
        """Whether a training by moving averages has left any."""
        return bool(self.average_hits.any()) or bool(self.average_sums.any())

    def forget_averages(self) -> None:
        """Before a training that does not update them."""
        self.average_hits.zero_()
        self.average_sums.zero_()
