# SPDX-License-Identifier: Apache-2.0
"""Multi-scale VQ-VAE: images to token maps and back."""

import copy
from functools import partial

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..attention_backends import AttentionBackendMixin
from ..loading import CheckedModelMixin
from ..ranges import PositiveInt, checked
from ..scales import normalize_patch_nums
from .checks import as_pixels, check_latents, wants_dict
from .codebook import BaseCodebook, CodeWeights
from .configuration_vqvae import VQVAEConfig
from .layers import Decoder, Encoder, init_convolution
from .modeling_outputs import VQVAEDecoderOutput, VQVAEEncoderOutput, VQVAEOutput
from .quantization import MultiScaleResidualQuantizer, ScaleCallback, full_precision
from .tiling import SlicingAndTilingMixin
from .token_maps import TokenMapsMixin


class VQVAEModel(TokenMapsMixin, SlicingAndTilingMixin, CheckedModelMixin, AttentionBackendMixin, PreTrainedModel):
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
        encoder_channels = config.num_encoder_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(encoder_channels, channels, kernel_size, padding=kernel_size // 2)
        self.quantizer = MultiScaleResidualQuantizer(config)
        self.post_quant_conv = nn.Conv2d(channels, encoder_channels, kernel_size, padding=kernel_size // 2)
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
        self,
        pixel_values: torch.Tensor,
        return_dict: bool | None = None,
        quantize: bool = True,
        callback_on_scale_end: ScaleCallback | None = None,
    ) -> VQVAEOutput | tuple[torch.Tensor, ...]:
        r"""
        Reconstruct images, with the quantizer's loss and straight-through gradients for training.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, in_channels, height, width)`):
                Images in `[-1, 1]`, of the size `config.image_size`. Of class maps (`VQVAEConfig.sample_type`) they are
                one-hot, 0 and 1, or a `torch.LongTensor` of shape `(batch, height, width)` of the ids.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEOutput`] instead of a tuple.
            quantize (`bool`, *optional*, defaults to `True`):
                `False` decodes the features themselves, as if there were infinitely many codes: no codes, a loss of
                zero. For the first steps of a training.
            callback_on_scale_end (`Callable`, *optional*):
                Called after every scale with the vectors that were searched, in fp32 and without a gradient,
                `(batch, length of scale, latent_channels)`, and their codes `(batch, length of scale)`. It may move
                the code vectors, unless they require a gradient: the next scale searches the new ones. For trainings
                of the codebook.

        Raises:
            `ValueError`: If the images do not fit the configuration, or are not finite or one-hot (checked on the CPU
                only).
        """
        pixel_values = as_pixels(pixel_values, self.config)
        features = self._encode_features(pixel_values)
        if not self.training:
            # Contiguous, so that callers can use `.view()`.
            features = features.contiguous()
        if not quantize:
            loss = torch.zeros((), dtype=torch.float32, device=features.device)
            output = VQVAEOutput(loss=loss, sample=self._decode_latents(features), features=features)
            return output if wants_dict(return_dict, self.config) else output.to_tuple()
        with full_precision(features):
            quantized = self.quantizer(features, True, callback_on_scale_end)
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
                Images in `[-1, 1]`, of the size `config.image_size`. Of class maps (`VQVAEConfig.sample_type`) they are
                one-hot, 0 and 1, or a `torch.LongTensor` of shape `(batch, height, width)` of the ids.
            return_dict (`bool`, *optional*):
                Whether to return a [`VQVAEEncoderOutput`] instead of a tuple.

        Raises:
            `ValueError`: If the images do not fit the configuration, or are not finite or one-hot (checked on the CPU
                only).
        """
        pixel_values = as_pixels(pixel_values, self.config)
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
        Turn token maps, or latents, into images in `[-1, 1]`, or into the logits of class maps.

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
        if self.config.num_pixel_classes is None:
            sample = sample.clamp(-1, 1)
        output = VQVAEDecoderOutput(sample=sample.contiguous())
        return output if wants_dict(return_dict, self.config) else output.to_tuple()

    def at_size(self, height: int, width: int) -> "VQVAEModel":
        r"""
        The same tokenizer for images of another size. No weight depends on the size if all token maps have the size of
        the latents, as in a VQ-VAE, VQGAN or RQ-VAE.

        Args:
            height (`int`): Height of the images in pixels, a multiple of `config.downsampling_factor`.
            width (`int`): Their width, likewise.

        Returns:
            [`VQVAEModel`]: It shares all modules and weights with this one, which stays as it is, and has a
            configuration of its own.

        Raises:
            `ValueError`: If the token maps are of several sizes, or a side is not a positive multiple.

        Example:

        ```python
        >>> from hf_var import VQVAEConfig, VQVAEModel

        >>> config = VQVAEConfig(base_channels=32, channel_multipliers=(1, 2), latent_channels=8, patch_nums=(4, 4))
        >>> VQVAEModel(config).at_size(8, 12).config.patch_nums
        [[4, 6], [4, 6]]
        ```
        """
        config, factor = copy.deepcopy(self.config), self.config.downsampling_factor
        if len(set(config.scale_sizes)) > 1:
            raise ValueError(f"`patch_nums` must be maps of one size for `at_size`, got {config.patch_nums}.")
        sides = {"height": height, "width": width}
        for name, side in sides.items():
            if checked(name, side, PositiveInt) % factor:
                raise ValueError(f"`{name}` must be a multiple of {factor}, the downsampling factor, got {side}.")
        size = [side // factor for side in sides.values()]
        config.patch_nums = normalize_patch_nums([size] * len(config.patch_nums))
        with torch.device("meta"):
            model = type(self)(config)
        for name, module in self.named_children():
            if module is not self.quantizer:
                setattr(model, name, module)
        for name, module in self.quantizer.named_children():
            setattr(model.quantizer, name, module)
        self._copy_options(model)
        # Accelerate's hook of the whole model, which brings all weights to the device.
        if hasattr(self, "_hf_hook"):
            model._hf_hook = self._hf_hook
        return model.train(self.training)

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
