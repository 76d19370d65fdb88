# SPDX-License-Identifier: Apache-2.0
"""
The multi-scale VQ-VAE of VAR (Tian et al. 2024, algorithms 1 and 2; its convolutions are VQGAN's, Esser et al. 2021)
rendered plainly, with our weights: contiguous NCHW tensors, distances of all codes in full, attention as three products.
"""

import torch
from torch.nn import functional

from hf_var import VQVAEModel
from hf_var.autoencoders.layers import GROUP_NORM_EPSILON
from hf_var.autoencoders.quantization import refinement_conv_indices
from hf_var.scales import bounds


class PlainVQVAE:
    """
    A multi-scale VQ-VAE as functions of the weights of ours.

    Args:
        vqvae ([`VQVAEModel`]): Its weights are shared, unless they are in another memory format than NCHW.
    """

    def __init__(self, vqvae: VQVAEModel):
        self.config = vqvae.config
        self.weights = {name: tensor.detach().contiguous() for name, tensor in vqvae.state_dict().items()}
        self.dtype = self.weights["decoder.norm_out.weight"].dtype
        num_scales = len(self.config.scale_sizes)
        self.phi_indices = refinement_conv_indices(num_scales, self.config.num_refinement_convs or num_scales)

    def zero_latents(self, batch_size: int) -> torch.Tensor:
        """Latents `(batch, latent_channels, height, width)` before the first scale."""
        shape = (batch_size, self.config.latent_channels, *self.config.latent_size)
        return torch.zeros(shape, device=self.weights["quantizer.codebook.weight"].device)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Codes `(batch, length)` of images `(batch, channels, height, width)` in [-1, 1]."""
        config, codebook = self.config, self.weights["quantizer.codebook.weight"]
        hidden_states = self._conv(pixel_values.to(self.dtype), "encoder.conv_in")
        last = len(config.channel_multipliers) - 1
        for level in range(last + 1):
            hidden_states = self._blocks(
                hidden_states, f"encoder.levels.{level}", config.num_res_blocks, level == last
            )
            if level < last:
                padded = functional.pad(hidden_states, (0, 1, 0, 1))
                hidden_states = self._conv(padded, f"encoder.levels.{level}.resample.conv", stride=2, padding=0)
        hidden_states = self._mid_block(hidden_states, "encoder.mid_block")
        hidden_states = self._conv(self._norm_silu(hidden_states, "encoder.norm_out"), "encoder.conv_out")
        residual = self._conv(hidden_states, "quant_conv", padding=config.quant_conv_kernel_size // 2).float()
        codes = []
        for k, size in enumerate(config.scale_sizes):
            pooled = (
                functional.interpolate(residual, size=size, mode="area") if size != config.latent_size else residual
            )
            vectors = pooled.permute(0, 2, 3, 1).reshape(-1, config.latent_channels)
            if config.normalize_codebook:
                nearest = (functional.normalize(vectors, dim=-1) @ functional.normalize(codebook, dim=-1).T).argmax(-1)
            else:
                distances = vectors.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)
                nearest = distances.addmm_(vectors, codebook.T, alpha=-2).argmin(dim=1)
            codes.append(nearest.view(len(residual), -1))
            residual = residual - self._expand(codes[-1], k)
        return torch.cat(codes, dim=1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images `(batch, channels, height, width)` in [-1, 1] of codes `(batch, length)`."""
        latents = self.zero_latents(len(codes))
        for k, (begin, end) in enumerate(bounds(self.config.scale_lengths)):
            latents = latents + self._expand(codes[:, begin:end], k)
        return self.decode_latents(latents).clamp(-1, 1)

    @torch.no_grad()
    def teacher_forcing(self, codes: torch.Tensor) -> torch.Tensor:
        """Inputs of all scales but the first, `(batch, length - length of the first, latent_channels)`."""
        latents, inputs = self.zero_latents(len(codes)), []
        for k, (begin, end) in enumerate(bounds(self.config.scale_lengths)[:-1]):
            latents, following = self.add_scale(latents, codes[:, begin:end], k)
            inputs.append(following)
        return torch.cat(inputs, dim=1)

    def add_scale(
        self, latents: torch.Tensor, codes: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents with scale `k`, and what a transformer reads for the next one."""
        latents, sizes = latents + self._expand(codes, k), self.config.scale_sizes
        if k + 1 == len(sizes):
            return latents, None
        pooled = functional.interpolate(latents, size=sizes[k + 1], mode="area")
        return latents, pooled.flatten(2).transpose(1, 2)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The decoder's output."""
        config = self.config
        padding = config.quant_conv_kernel_size // 2
        hidden_states = self._conv(latents.to(self.dtype), "post_quant_conv", padding=padding)
        hidden_states = self._mid_block(self._conv(hidden_states, "decoder.conv_in"), "decoder.mid_block")
        last = len(config.channel_multipliers) - 1
        for level in range(last + 1):
            name = f"decoder.levels.{level}"
            hidden_states = self._blocks(hidden_states, name, config.num_res_blocks + 1, level == 0)
            if level < last:
                hidden_states = functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
                hidden_states = self._conv(hidden_states, f"{name}.resample.conv")
        return self._conv(self._norm_silu(hidden_states, "decoder.norm_out"), "decoder.conv_out")

    def _expand(self, codes: torch.Tensor, k: int) -> torch.Tensor:
        config, size = self.config, self.config.scale_sizes[k]
        vectors = functional.embedding(codes, self.weights["quantizer.codebook.weight"])
        expanded = vectors.transpose(1, 2).unflatten(2, size)
        if size != config.latent_size:
            expanded = functional.interpolate(expanded, size=config.latent_size, mode="bicubic")
        expanded = expanded.contiguous()
        if config.refinement_ratio == 0:
            return expanded
        refined = self._conv(expanded, f"quantizer.refinement_convs.{self.phi_indices[k]}")
        return expanded * (1 - config.refinement_ratio) + refined * config.refinement_ratio

    def _conv(self, inputs: torch.Tensor, name: str, stride: int = 1, padding: int = 1) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.conv2d(inputs, weight, bias, stride=stride, padding=0 if weight.shape[-1] == 1 else padding)

    def _norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.group_norm(inputs, self.config.norm_num_groups, weight, bias, eps=GROUP_NORM_EPSILON)

    def _norm_silu(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return functional.silu(self._norm(inputs, name), inplace=True)

    def _resnet(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        hidden_states = self._conv(self._norm_silu(inputs, f"{name}.norm1"), f"{name}.conv1")
        hidden_states = self._conv(self._norm_silu(hidden_states, f"{name}.norm2"), f"{name}.conv2")
        has_shortcut = f"{name}.shortcut.weight" in self.weights
        return (self._conv(inputs, f"{name}.shortcut") if has_shortcut else inputs) + hidden_states

    def _attention(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        channels, size = inputs.shape[1], inputs.shape[-2:]
        projected = self._conv(self._norm(inputs, f"{name}.norm"), f"{name}.qkv").flatten(2)
        query, key, value = projected.chunk(3, dim=1)  # each (batch, channels, positions)
        weights = (torch.bmm(query.transpose(1, 2), key) * channels**-0.5).softmax(dim=-1)
        attended = torch.bmm(value, weights.transpose(1, 2)).unflatten(2, size)
        return inputs + self._conv(attended, f"{name}.proj_out")

    def _blocks(self, hidden_states: torch.Tensor, name: str, number: int, is_coarsest: bool) -> torch.Tensor:
        for index in range(number):
            hidden_states = self._resnet(hidden_states, f"{name}.resnets.{index}")
            if is_coarsest and self.config.last_level_attention:
                hidden_states = self._attention(hidden_states, f"{name}.attentions.{index}")
        return hidden_states

    def _mid_block(self, hidden_states: torch.Tensor, name: str) -> torch.Tensor:
        hidden_states = self._resnet(hidden_states, f"{name}.resnet1")
        if self.config.mid_block_attention:
            hidden_states = self._attention(hidden_states, f"{name}.attention")
        return self._resnet(hidden_states, f"{name}.resnet2")
