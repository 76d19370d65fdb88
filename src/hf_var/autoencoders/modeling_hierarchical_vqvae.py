# SPDX-License-Identifier: Apache-2.0
"""Hierarchical VQ-VAE: images to token maps of several levels and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..attention_backends import AttentionBackendMixin
from ..loading import CheckedModelMixin
from ..scales import bounds
from .checks import as_codes, as_scale, check_pixels, check_shape, wants_dict
from .codebook import AveragedCodebook, CodeWeights
from .configuration_hierarchical_vqvae import HierarchicalVQVAEConfig
from .layers import init_convolution
from .modeling_outputs import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEOutput
from .plain_layers import PlainDecoder, PlainEncoder
from .quantization import full_precision


def as_map(vectors: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Vectors `(batch, length, channels)` as a map `(batch, channels, *size)`, always in the same memory format."""
    return vectors.transpose(1, 2).unflatten(2, size).contiguous()


class Levels(NamedTuple):
    """What becomes of images, level by level, coarse to fine; each map is `(batch, latent_channels, height, width)`."""

    features: list[torch.Tensor]
    latents: list[torch.Tensor]
    codes: list[torch.Tensor]
    loss: torch.Tensor


class HierarchicalVQVAEModel(CheckedModelMixin, AttentionBackendMixin, PreTrainedModel):
    r"""
    Hierarchical VQ-VAE. With one level it is VQ-VAE (van den Oord et al. 2017), with more VQ-VAE-2 (Razavi et al. 2019,
    arXiv 1906.00446, section 3.1).

    Every level encodes the output of the level below, the finest one the image. The coarsest features are quantized first;
    every other level quantizes features that also know the decoded codes of the coarser ones. The image is decoded from the
    code vectors of all levels. So a level adds what the coarser ones lack, and each has its own codebook. The wiring is that of
    the [public implementation](https://github.com/rosinality/vq-vae-2-pytorch), for any number of levels.

    Codes of all levels are one tensor, as those of a [`VQVAEModel`]. There are no running latents, since levels are
    concatenated and not added: a [`VARTransformer`] and its pipelines need a [`VQVAEModel`].

    Args:
        config ([`HierarchicalVQVAEConfig`]): Sizes and levels.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import HierarchicalVQVAEConfig, HierarchicalVQVAEModel

    >>> config = HierarchicalVQVAEConfig(image_size=16, base_channels=16, residual_channels=8, latent_channels=8)
    >>> model = HierarchicalVQVAEModel(config).eval()
    >>> codes = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1).codes  # 2x2 and 4x4 codes
    >>> codes.shape
    torch.Size([2, 20])
    >>> model.decode(codes).sample.shape
    torch.Size([2, 3, 16, 16])
    ```
    """

    config: HierarchicalVQVAEConfig
    config_class = HierarchicalVQVAEConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    # Modules that are called outside the root's forward: diffusers' group offloading loads the others only there.
    # Lists are blocks anyway.
    _group_offload_block_modules = ["decoder"]
    _no_split_modules = ["PlainEncoder", "PlainDecoder"]
    _keep_in_fp32_modules_strict = ["codebooks"]

    def __init__(self, config: HierarchicalVQVAEConfig):
        super().__init__(config)
        # Lists of levels are coarse to fine, as the codes.
        strides = config.strides[::-1]
        width, channels, last = config.base_channels, config.latent_channels, len(strides) - 1
        self.encoders = nn.ModuleList(
            PlainEncoder(config, config.in_channels if level == last else width, stride)
            for level, stride in enumerate(strides)
        )
        self.quant_convs = nn.ModuleList(
            nn.Conv2d(width + channels * (level > 0), channels, kernel_size=1) for level in range(len(strides))
        )
        self.codebooks = nn.ModuleList(AveragedCodebook(config) for _ in strides)
        # From the latents of a level and of all coarser ones: what the next level's features know of them, and the same
        # latents at the next level's size.
        self.condition_decoders = nn.ModuleList(
            PlainDecoder(config, channels * (level + 1), channels, stride) for level, stride in enumerate(strides[:-1])
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(
                channels * (level + 1),
                channels * (level + 1),
                kernel_size=2 * stride,
                stride=stride,
                padding=stride // 2,
            )
            for level, stride in enumerate(strides[:-1])
        )
        self.decoder = PlainDecoder(config, channels * len(strides), config.num_output_channels, strides[-1])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoders[-1].downsamplers[0]  # pyright: ignore[reportReturnType, reportIndexIssue]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoders[-1].downsamplers[0] = value  # pyright: ignore

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CodeWeights):
            module.init_weights()
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init_convolution(module)

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, quantize: bool = True, **kwargs
    ) -> VQVAEOutput | tuple[torch.Tensor, ...]:
        r"""
        Reconstruct images, with the quantizers' loss, a sum over the levels, and straight-through gradients for training.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                Images in `[-1, 1]`, of the size `config.image_size`.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEOutput`] instead of a tuple.
            quantize (`bool`, *optional*, defaults to `True`):
                `False` decodes the features themselves, as if there were infinitely many codes: no codes, a loss of
                zero. For the first steps of a training.

        Raises:
            `ValueError`: If the images' shape does not fit the configuration.
        """
        levels = self._encode_levels(pixel_values, quantize)
        output = VQVAEOutput(
            loss=levels.loss, sample=self._decode_latents(levels.latents), features=tuple(levels.features)
        )
        if quantize:
            output.latents = tuple(levels.latents)
            output.codes = torch.cat(levels.codes, dim=1)
            output.quantizer_inputs = self.quantizer_inputs(levels.features)
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    @apply_forward_hook
    def encode(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None
    ) -> VQVAEEncoderOutput | tuple[torch.Tensor, ...]:
        r"""
        Turn images into token maps.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                Images in `[-1, 1]`, of the size `config.image_size`.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEEncoderOutput`] instead of a tuple.

        Raises:
            `ValueError`: If the images' shape does not fit the configuration.
        """
        levels = self._encode_levels(pixel_values)
        output = VQVAEEncoderOutput(
            features=tuple(levels.features), latents=tuple(levels.latents), codes=torch.cat(levels.codes, dim=1)
        )
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    @apply_forward_hook
    def decode(
        self,
        codes: torch.Tensor | None = None,
        latents: Sequence[torch.Tensor] | None = None,
        num_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> VQVAEDecoderOutput | tuple[torch.Tensor, ...]:
        r"""
        Turn token maps, or latents, into images.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Token maps of all levels, coarse to fine; those after `num_scales` may be missing.
            latents (`tuple[torch.FloatTensor]`, *optional*):
                In place of `codes`, a map `(batch, latent_channels, height, width)` of every level, coarse to fine.
            num_scales (`int`, *optional*, defaults to all):
                Decode the first `num_scales` levels of `codes`, with zeros for the latents of the others.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEDecoderOutput`] instead of a tuple.

        Raises:
            `ValueError`: If not exactly one of `codes` and `latents` is given, or shapes or codes do not fit.
        """
        if codes is not None and latents is None:
            latents = self.latents(codes, num_scales)
        elif latents is not None and codes is None:
            if num_scales is not None:
                raise ValueError(f"`num_scales` goes with `codes`, got num_scales={num_scales} with `latents`.")
            self._check_maps("latents", latents)
        else:
            raise ValueError("Pass exactly one of `codes` and `latents`.")
        sample = self._decode_latents(latents)
        output = VQVAEDecoderOutput(sample=sample.clamp(-1, 1))
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    def latents(self, codes: torch.Tensor, num_scales: int | None = None) -> tuple[torch.Tensor, ...]:
        r"""
        The code vectors as maps, which [`HierarchicalVQVAEModel.decode`] turns into an image.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`):
                Token maps of all levels, coarse to fine; those after `num_scales` may be missing.
            num_scales (`int`, *optional*, defaults to all): The maps after this many levels are zero.

        Returns:
            `tuple[torch.FloatTensor]`: For each level `(batch, latent_channels, height, width)`, in fp32.

        Raises:
            `ValueError`: If shape, codes or `num_scales` do not fit.
        """
        lengths, sizes = self.config.scale_lengths, self.config.scale_sizes
        if num_scales is None:
            num_scales = len(lengths)
        else:
            num_scales = as_scale("num_scales", num_scales, 1, len(lengths))
        end = sum(lengths[:num_scales])
        codes = as_codes(codes, self.config, sorted({end, sum(lengths)}))
        vectors = self.code_vectors(codes[:, :end]).split(lengths[:num_scales], dim=1)
        maps = [as_map(part, size) for part, size in zip(vectors, sizes, strict=False)]
        shape = codes.shape[0], self.config.latent_channels
        return (*maps, *(maps[0].new_zeros(*shape, *size) for size in sizes[num_scales:]))

    @apply_forward_hook
    def code_vectors(self, codes: torch.Tensor) -> torch.Tensor:
        r"""
        Look codes up, those of every level in its own codebook.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of the first levels or of all, coarse to fine.

        Returns:
            `torch.FloatTensor` of shape `(batch, length, latent_channels)`, in fp32.

        Raises:
            `ValueError`: If the shape does not fit or a code is out of range.
        """
        limits = bounds(self.config.scale_lengths)
        codes = as_codes(codes, self.config, [end for _, end in limits])
        with full_precision(codes):
            parts = zip(self.codebooks, limits, strict=True)
            return torch.cat([codebook(codes[:, begin:end]) for codebook, (begin, end) in parts], dim=1)

    def quantizer_inputs(self, features: Sequence[torch.Tensor], exact: bool = False) -> torch.Tensor:
        r"""
        The vectors that codes are searched for: the features of all levels, one after the other.

        Args:
            features (`tuple[torch.FloatTensor]`): Features, as [`HierarchicalVQVAEModel.encode`] returns them.
            exact (`bool`, *optional*, defaults to `False`):
                Without effect, as features are given: for [`VQVAEModel.quantizer_inputs`], where it matters.

        Returns:
            `torch.FloatTensor` of shape `(batch, length, latent_channels)`, in fp32 and without a gradient.

        Raises:
            `ValueError`: If a shape does not fit.
        """
        self._check_maps("features", features)
        return torch.cat([part.detach().float().flatten(2).transpose(1, 2) for part in features], dim=1)

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def _encode_levels(self, pixel_values: torch.Tensor, quantize: bool = True) -> Levels:
        """Features, latents and codes of images; without `quantize` the features are the latents."""
        check_pixels(pixel_values, self.config)
        hidden_states, outputs = pixel_values.to(self._compute_dtype), []
        for encoder in reversed(self.encoders):
            hidden_states = encoder(hidden_states)
            outputs.insert(0, hidden_states)
        features, latents, codes, loss = [], [], [], torch.zeros((), dtype=torch.float32, device=pixel_values.device)
        for level, output in enumerate(outputs):
            if level > 0:
                condition = self.condition_decoders[level - 1](self._gather(latents))
                output = torch.cat([condition, output], dim=1)
            features.append(self.quant_convs[level](output).contiguous())
            if not quantize:
                latents.append(features[-1])
                continue
            with full_precision(pixel_values):
                own, own_codes, own_loss = self._quantize(level, features[-1].float())
            latents.append(own)
            codes.append(own_codes)
            loss = loss + own_loss
        return Levels(features, latents, codes, loss)

    def _quantize(self, level: int, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, codes and loss of a level."""
        codebook = self.codebooks[level]
        codes = codebook(features.flatten(2).transpose(1, 2))  # (batch, length of level)
        vectors = as_map(codebook(codes), features.shape[2:])
        commitment = functional.mse_loss(vectors.detach(), features)
        loss = self.config.commitment_loss_weight * commitment
        loss = loss + self.config.codebook_loss_weight * functional.mse_loss(vectors, features.detach())
        # The value is exactly that of the vectors: decoding the codes gives the same image.
        return vectors.detach() + (features - features.detach()), codes, loss

    def _gather(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """The latents of some levels, coarse to fine, concatenated at the size of the finest of them."""
        gathered = latents[0].to(self._compute_dtype)
        for upsampler, own in zip(self.upsamplers, latents[1:], strict=False):
            gathered = torch.cat([upsampler(gathered), own.to(self._compute_dtype)], dim=1)
        return gathered  # (batch, levels * latent_channels, height, width)

    def _decode_latents(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.decoder(self._gather(latents))

    def _check_maps(self, name: str, maps: Sequence[torch.Tensor]) -> None:
        sizes = self.config.scale_sizes
        if not isinstance(maps, Sequence) or len(maps) != len(sizes):
            found = f"{len(maps)} of them" if isinstance(maps, Sequence) else type(maps).__name__
            raise ValueError(f"`{name}` must be a tuple with one map for each of {len(sizes)} levels, got {found}.")
        for level, (own, size) in enumerate(zip(maps, sizes, strict=True)):
            check_shape(f"{name}[{level}]", own, (self.config.latent_channels, *size), self.config)


__all__ = ["HierarchicalVQVAEModel"]
