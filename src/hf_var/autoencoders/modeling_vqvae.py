# SPDX-License-Identifier: Apache-2.0
"""Multi-scale VQ-VAE: images to token maps and back."""

from functools import partial

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..loading import CheckedModelMixin
from ..tensor_checks import check_batch
from .checks import as_codes, as_scale, check_latents, check_pixels, check_shape, check_weights, wants_dict
from .codebook import BaseCodebook, CodeWeights
from .configuration_vqvae import VQVAEConfig
from .layers import Decoder, Encoder, init_convolution
from .modeling_outputs import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEOutput
from .quantization import MultiScaleResidualQuantizer, full_precision
from .tiling import SlicingAndTilingMixin


class VQVAEModel(SlicingAndTilingMixin, CheckedModelMixin, PreTrainedModel):
    r"""
    Multi-scale residual VQ-VAE (Tian et al. 2024, section 3.2). With other `patch_nums` the same class is a VQ-VAE,
    the generator of VQGAN or an RQ-VAE.

    Args:
        config ([`VQVAEConfig`]): Sizes and schedule.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import VQVAEConfig, VQVAEModel

    >>> config = VQVAEConfig(base_channels=32, channel_multipliers=(1, 2), latent_channels=8, patch_nums=(1, 2, 4))
    >>> model = VQVAEModel(config).eval()
    >>> codes = model.encode(torch.rand(2, 3, 8, 8) * 2 - 1).codes
    >>> codes.shape
    torch.Size([2, 21])
    >>> model.decode(codes).sample.shape
    torch.Size([2, 3, 8, 8])
    ```
    """

    config: VQVAEConfig
    config_class = VQVAEConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    # Modules that are called outside the root's forward: diffusers' group offloading loads the others only there.
    _group_offload_block_modules = ["encoder", "quant_conv", "quantizer", "codebook", "post_quant_conv", "decoder"]
    _no_split_modules = ["ResnetBlock", "AttentionBlock", "MultiScaleResidualQuantizer"]
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        kernel_size = config.quant_conv_kernel_size
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.quantizer = MultiScaleResidualQuantizer(config)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.decoder = Decoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.conv_in

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.conv_in = value  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CodeWeights):
            module.init_weights()
        elif isinstance(module, nn.Conv2d):
            init_convolution(module)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, quantize: bool = True
    ) -> VQVAEOutput | tuple[torch.Tensor, ...]:
        r"""
        Reconstruct images, with the quantizer's loss and straight-through gradients for training.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                Images in `[-1, 1]`, of the size `config.image_size`.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEOutput`] instead of a tuple.
            quantize (`bool`, *optional*, defaults to `True`):
                `False` decodes the features themselves, as if there were infinitely many codes: no codes, a loss of
                zero. For the first steps of a training.

        Raises:
            `ValueError`: If the images do not fit the configuration, or are not finite (checked on the CPU only).
        """
        check_pixels(pixel_values, self.config)
        features = self._encode_features(pixel_values)
        if not self.training:
            # Contiguous, so that callers can use `.view()`.
            features = features.contiguous()
        if not quantize:
            loss = torch.zeros((), dtype=torch.float32, device=features.device)
            output = VQVAEOutput(loss=loss, sample=self._decode_latents(features), features=features)
            return output if wants_dict(return_dict, self.config) else output.to_tuple()
        with full_precision(features):
            quantized = self.quantizer(features, return_loss=True)
            straight_through = self.quantizer.straight_through(features, quantized.latents)
        sample = self._decode_latents(straight_through)
        output = VQVAEOutput(
            loss=quantized.loss,
            sample=sample if self.training else sample.contiguous(),
            features=features,
            latents=straight_through,
            codes=quantized.codes,
            quantizer_inputs=quantized.inputs,
        )
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
            `ValueError`: If the images do not fit the configuration, or are not finite (checked on the CPU only).
        """
        check_pixels(pixel_values, self.config)
        # Contiguous, so that callers can use `.view()`.
        features = self._map_slices(self._encode_features, pixel_values).contiguous()
        with full_precision(features):
            quantized = self.quantizer(features)
        output = VQVAEEncoderOutput(features=features, latents=quantized.latents, codes=quantized.codes)
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    @apply_forward_hook
    def decode(
        self,
        codes: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        num_scales: int | None = None,
        return_dict: bool | None = None,
    ) -> VQVAEDecoderOutput | tuple[torch.Tensor, ...]:
        r"""
        Turn token maps, or latents, into images.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Token maps of all scales, coarse to fine; those after `num_scales` may be missing.
            latents (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`, *optional*):
                Running reconstruction, in place of `codes`.
            num_scales (`int`, *optional*, defaults to all):
                Decode the sum of the first `num_scales` scales of `codes`.
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
            check_latents("latents", latents, self.config)
        else:
            raise ValueError("Pass exactly one of `codes` and `latents`.")
        sample = self._map_slices(partial(self._decode_latents, tiled=self.use_tiling), latents)
        output = VQVAEDecoderOutput(sample=sample.clamp(-1, 1).contiguous())
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    def latents(self, codes: torch.Tensor, num_scales: int | None = None) -> torch.Tensor:
        r"""
        The quantized reconstruction of codes, which [`VQVAEModel.decode`] turns into an image: the last of
        [`VQVAEModel.running_latents`], with the same arguments.
        """
        return self.running_latents(codes, num_scales)[-1]

    @apply_forward_hook
    def running_latents(self, codes: torch.Tensor, num_scales: int | None = None) -> list[torch.Tensor]:
        r"""
        The latents after every scale.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`):
                Token maps of all scales, coarse to fine; those after `num_scales` may be missing.
            num_scales (`int`, *optional*, defaults to all): Stop after this many scales.

        Returns:
            `list[torch.FloatTensor]`: For each scale `(batch, latent_channels, latent height, latent width)`, in fp32.

        Raises:
            `ValueError`: If shape, codes or `num_scales` do not fit.
        """
        scale_bounds = self.quantizer.scale_bounds
        if num_scales is None:
            num_scales = len(scale_bounds)
        else:
            num_scales = as_scale("num_scales", num_scales, 1, len(scale_bounds))
        end = scale_bounds[num_scales - 1][1]
        codes = as_codes(codes, self.config, sorted({end, scale_bounds[-1][1]}))
        with full_precision(codes):
            return [step.latents for step in self.quantizer.steps(codes=codes[:, :end])]

    @apply_forward_hook
    def quantizer_inputs(self, features: torch.Tensor, exact: bool = False) -> torch.Tensor:
        r"""
        The vectors that the quantizer searches codes for: what the scales before leave of the features, reduced to each
        scale's size.

        Args:
            features (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`):
                Features, as [`VQVAEModel.encode`] returns them.
            exact (`bool`, *optional*, defaults to `False`):
                Take every scale to be coded without error, so that the later scales see what an infinitely fine codebook
                would leave.

        Returns:
            `torch.FloatTensor` of shape `(batch, length, latent_channels)`, in fp32 and without a gradient.

        Raises:
            `ValueError`: If the shape does not fit.
        """
        check_latents("features", features, self.config)
        with torch.no_grad(), full_precision(features):
            inputs = [step.inputs for step in self.quantizer.steps(features, exact=exact)]
            return torch.cat(inputs, dim=1)  # pyright: ignore[reportArgumentType]

    @apply_forward_hook
    def teacher_forcing(self, codes: torch.Tensor, is_raster: bool = False) -> torch.Tensor:
        r"""
        The transformer's inputs to predict `codes`: for every scale but the first, the latents after the scale before,
        reduced to the size of the scale (Tian et al. 2024, section 3.1).

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of all scales.
            is_raster (`bool`, *optional*, defaults to `False`):
                For a transformer that predicts one token after the other (`VARConfig.is_raster`): for every token but the
                first, the code vector of the one before (Esser et al. 2021, section 3.2).

        Returns:
            `torch.FloatTensor` of shape `(batch, length - tokens of the first block, latent_channels)`, in fp32.

        Raises:
            `ValueError`: If shape or codes do not fit.
        """
        codes = as_codes(codes, self.config, [self.quantizer.scale_bounds[-1][1]])
        with full_precision(codes):
            if is_raster:
                return self.quantizer.codebook(codes[:, :-1])
            steps = self.quantizer.steps(codes=codes[:, : self.quantizer.scale_bounds[-1][0]])
            inputs = [self.quantizer.tokens(step.latents, scale) for scale, step in enumerate(steps, start=1)]
        if not inputs:
            return torch.zeros(codes.shape[0], 0, self.config.latent_channels, device=codes.device)
        return torch.cat(inputs, dim=1)

    @apply_forward_hook
    def next_scale(
        self, latents: torch.Tensor | None, codes: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Add the token map of scale `k` to the running reconstruction.

        Args:
            latents (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)` or `None`):
                The latents after the scales before; `None` stands for zero.
            codes (`torch.LongTensor` of shape `(batch, length of scale k)` or `torch.FloatTensor` of shape
                `(batch, length of scale k, latent_channels)`):
                Codes of the scale or, where they are mixed or edited, code vectors.
            k (`int`): Scale, from 0.

        Returns:
            `tuple`: The latents after scale `k`, in fp32, and the `scale_inputs` of the next scale, of shape
            `(batch, its length, latent_channels)`, or `None` after the last one.

        Raises:
            `ValueError`: If `k` is not a scale, or shapes or batch sizes do not fit.
        """
        num_scales = len(self.quantizer.scale_sizes)
        k = as_scale("k", k, 0, num_scales - 1)
        begin, end = self.quantizer.scale_bounds[k]
        if isinstance(codes, torch.Tensor) and codes.is_floating_point():
            check_shape("code vectors", codes, (end - begin, self.config.latent_channels), self.config)
        else:
            codes = as_codes(codes, self.config, [end - begin])
        if latents is not None:
            check_latents("latents", latents, self.config)
        check_batch(latents=latents, codes=codes)
        with full_precision(codes):
            vectors = codes.float() if codes.is_floating_point() else self.quantizer.codebook(codes)
            update = self.quantizer.expand(vectors, k)
            latents = update if latents is None else latents.float() + update
            inputs = self.quantizer.tokens(latents, k + 1) if k + 1 < num_scales else None
        return latents, inputs

    @apply_forward_hook
    def scale_inputs(self, latents: torch.Tensor, k: int) -> torch.Tensor:
        r"""
        The transformer's inputs to predict the token map of scale `k`: the latents, reduced to its size.

        Args:
            latents (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`):
                The latents after the scales before.
            k (`int`): Scale, from 1.

        Returns:
            `torch.FloatTensor` of shape `(batch, length of scale k, latent_channels)`, in fp32.

        Raises:
            `ValueError`: If `k` is not a scale with an input or the shape does not fit.
        """
        k = as_scale("k", k, 1, len(self.quantizer.scale_sizes) - 1)
        check_latents("latents", latents, self.config)
        return self.quantizer.tokens(latents.float(), k)

    @apply_forward_hook
    def code_vectors(self, codes: torch.Tensor) -> torch.Tensor:
        r"""
        Look codes up.

        Args:
            codes (`torch.LongTensor` of any shape): Codes in `[0, codebook_size)`.

        Returns:
            `torch.FloatTensor` of shape `(*codes.shape, latent_channels)`, in fp32.

        Raises:
            `ValueError`: If `codes` are not integers or out of range.
        """
        codes = as_codes(codes, self.config)
        with full_precision(codes):
            return self.quantizer.codebook(codes)

    @apply_forward_hook
    def mix_code_vectors(self, weights: torch.Tensor) -> torch.Tensor:
        r"""
        Weighted sums of all code vectors, as the smooth sampling mode of VAR's demo uses them.

        Args:
            weights (`torch.Tensor` of shape `(..., codebook_size)`): Weights of the codes, for instance one-hot.

        Returns:
            `torch.FloatTensor` of shape `(..., latent_channels)`, in fp32.

        Raises:
            `ValueError`: If there is not one weight per code.
        """
        check_weights(weights, self.config)
        with full_precision(weights):
            all_codes = torch.arange(self.config.codebook_size, device=weights.device)
            return weights.float() @ self.quantizer.codebook(all_codes)

    @property
    def codebook(self) -> BaseCodebook:
        r"""
        Search and look-up of the code vectors, for trainings that move them: `codebook.vectors`, `(codebook_size,
        latent_channels)`, `codebook.set_vectors(vectors, codes)`, `codebook.requires_grad_(...)`, and
        `codebook.running_hits`, `(scales, codebook_size)`, a count of their use that is saved with the weights. The
        vectors are weights if `config.has_trainable_codes`.
        """
        return self.quantizer.codebook

    @property
    def codebooks(self) -> list[BaseCodebook]:
        r"""The codebooks, which share the scales evenly: a single one for all scales."""
        return [self.codebook]

    @property
    def _compute_dtype(self) -> torch.dtype:
        # The dtype of a norm, which layerwise casting leaves unchanged; the convolutions' weights may be stored in 8 bits.
        return self.decoder.norm_out.weight.dtype

    def _encode_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.quantizer.codebook.bound(self.quant_conv(self.encoder(pixel_values.to(self._compute_dtype))))

    def _decode_latents(self, latents: torch.Tensor, tiled: bool = False) -> torch.Tensor:
        latents = self.post_quant_conv(latents.to(self._compute_dtype))
        tile_size = self.tile_sample_min_size if tiled else None
        return self.decoder(latents, tile_size=tile_size, tile_overlap=self.tile_overlap_factor)


__all__ = ["VQVAEModel"]
