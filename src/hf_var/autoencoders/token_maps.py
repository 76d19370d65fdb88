# SPDX-License-Identifier: Apache-2.0
"""Calls of a tokenizer about token maps, latents and code vectors, which need its quantizer alone."""

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..ranges import PositiveFloat, checked
from ..tensor_checks import check_batch, check_finite
from .checks import as_codes, as_scale, check_latents, check_shape, check_weights
from .codebook import similarity
from .configuration_vqvae import VQVAEConfig
from .quantization import MultiScaleResidualQuantizer, full_precision


class TokenMapsMixin:
    """What transformers and pipelines ask of a [`VQVAEModel`] between encoding and decoding."""

    config: VQVAEConfig
    quantizer: MultiScaleResidualQuantizer

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
                Take every scale to be coded without error, so that the later scales see what an infinitely fine
                codebook would leave.

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
    def soft_codes(
        self,
        features: torch.Tensor,
        temperature: float = 1.0,
        stochastic: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Codes and, for each, the probabilities of all codes in its place (Lee et al. 2022, section 3.2.3): the softmax
        of the negative squared distances of the code vectors over `temperature`. Each scale codes what the codes of
        the scales before it leave. An [`RQTransformer`] that reads the former and predicts the latter, its
        `soft_labels`, has less exposure bias.

        Args:
            features (`torch.FloatTensor` of shape `(batch, latent_channels, latent height, latent width)`):
                Features, as [`VQVAEModel.encode`] returns them.
            temperature (`float`, *optional*, defaults to 1.0): Positive; the smaller, the likelier the nearest code.
            stochastic (`bool`, *optional*, defaults to `True`):
                Whether codes are drawn from the probabilities, scale after scale, instead of being the nearest ones.
            generator (`torch.Generator`, *optional*): Of the draws; it may be on another device.

        Returns:
            `tuple[torch.LongTensor, torch.FloatTensor]`: Codes `(batch, length)`, and probabilities of shape
            `(batch, length, codebook_size)`, in fp32 and without a gradient.

        Raises:
            `ValueError`: If the shape or an argument does not fit, the features are not finite (checked on the CPU
                only), or the codes have no distances (`quantizer="fsq"`).
        """
        if self.config.quantizer != "vq":
            raise ValueError(f"`quantizer` must be 'vq' for `soft_codes`, got {self.config.quantizer!r}.")
        check_latents("features", features, self.config)
        check_finite("features", features)
        temperature = float(checked("temperature", temperature, PositiveFloat))
        stochastic = checked("stochastic", stochastic, bool)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"`generator` must be a `torch.Generator` or None, got {type(generator).__name__}.")
        probabilities = []
        with torch.no_grad(), full_precision(features):
            codebook = self.quantizer.codebook
            vectors = codebook(torch.arange(self.config.codebook_size, device=features.device))

            def search(inputs: torch.Tensor) -> torch.Tensor:
                scores = 2 * similarity(inputs.flatten(0, 1), vectors, self.config.normalize_codebook)
                shares = torch.softmax(scores / temperature, dim=-1)  # (batch * length of scale, codebook_size)
                probabilities.append(shares.unflatten(0, inputs.shape[:2]))
                if not stochastic:
                    return codebook(inputs)
                device = shares.device if generator is None else generator.device
                drawn = torch.multinomial(shares.to(device), 1, generator=generator)
                return drawn.to(shares.device).view(inputs.shape[:2])

            codes = [step.codes for step in self.quantizer.steps(features, search=search)]
        return torch.cat(codes, dim=1), torch.cat(probabilities, dim=1)  # pyright: ignore[reportArgumentType]

    @apply_forward_hook
    def teacher_forcing(self, codes: torch.Tensor, is_raster: bool = False) -> torch.Tensor:
        r"""
        The transformer's inputs to predict `codes`: for every scale but the first, the latents after the scale before,
        reduced to the size of the scale (Tian et al. 2024, section 3.1).

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Token maps of all scales.
            is_raster (`bool`, *optional*, defaults to `False`):
                For a transformer that predicts one token after the other (`VARConfig.is_raster`): for every token but
                the first, the code vector of the one before (Esser et al. 2021, section 3.2).

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
            codes (`torch.LongTensor` of shape `(batch, length of scale k)` or `torch.FloatTensor`):
                Codes of the scale or, where they are mixed or edited, code vectors of shape
                `(batch, length of scale k, latent_channels)`.
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
