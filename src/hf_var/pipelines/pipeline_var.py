# SPDX-License-Identifier: Apache-2.0
"""Images from class labels, and the loop over the scales, which is that of all pipelines of a VAR transformer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack

import torch

from ..autoencoders import VQVAEModel
from ..priors import VARConfig, VARTransformer
from ..priors.likelihood import token_log_probs
from .base import CallState, Prepared, TokenScorer
from .components import check_components
from .conditions import Condition, Labels
from .editing import first_sampled_scale
from .images import check_pasting, given_tokens, image_pixels, mask_pixels, paste_kept
from .options import CHECKPOINT_DEFAULTS, CallOptions, CallSettings, check_layers, show_options
from .pipeline_base import VARPipelineBase
from .previews import StreamMixin
from .scale_sampling import GivenCodes, ScaleSampling, scale_predictor


class ScalePipeline(StreamMixin, VARPipelineBase):
    """
    Sampling of the token maps of all scales, with parts of images given or without. What differs between its classes
    is the condition: each call hands over `prepare`, which checks its arguments and makes the condition.
    """

    _callback_tensor_inputs = ["latents", "images"]

    def _generate(self, prepare: Callable[..., Prepared]) -> Any:
        """Sample whole images."""
        call, condition, _ = prepare()
        with self._at_work(call.sampling.refiner):
            latents, codes = self._draw_best(call, condition)
            return self._output(call, self._images(latents, call.output_type), codes)

    def _repaint(
        self,
        prepare: Callable[..., Prepared],
        image: Any,
        mask_image: Any,
        paste_original: bool,
        feather_width: int | None,
    ) -> Any:
        """Sample the white parts of masks, see [`VARInpaintPipeline`]."""
        config = self.vqvae.config
        pixels, mask = image_pixels(image, config), mask_pixels(mask_image, config)
        call, condition, items = prepare(image=len(pixels), mask_image=len(mask))
        feather_width = check_pasting(paste_original, feather_width, call.output_type, config)
        with self._at_work(call.sampling.refiner) as device:
            codes = self._encode(pixels)[items["image"]]
            kept = given_tokens(mask, config)[items["mask_image"]].to(device)
            latents, codes = self._draw_best(call, condition, GivenCodes(codes, config.scale_lengths, kept=kept))
            if not paste_original:
                return self._output(call, self._images(latents, call.output_type), codes)
            sample = self._decode(latents)
            pixels, mask = pixels[items["image"]].to(sample.device), mask[items["mask_image"]].to(sample.device)
            sample = paste_kept(sample, pixels, mask, feather_width)
            images = self.image_processor.postprocess(sample, output_type=call.output_type)
            return self._output(call, images, codes)

    def _vary(
        self,
        prepare: Callable[..., Prepared],
        image: Any,
        strength: float | None,
        num_kept_scales: int | None,
    ) -> Any:
        """Sample the fine scales of images, see [`VARImg2ImgPipeline`]."""
        config = self.vqvae.config
        first_scale = first_sampled_scale(strength, num_kept_scales, len(config.patch_nums))
        pixels = image_pixels(image, config)
        call, condition, items = prepare(image=len(pixels))
        with self._at_work(call.sampling.refiner):
            codes = self._encode(pixels)[items["image"]]
            latents, codes = self._draw_best(call, condition, GivenCodes(codes, config.scale_lengths, first_scale))
            return self._output(call, self._images(latents, call.output_type), codes)

    def _scorer(self, codes: torch.Tensor) -> TokenScorer:
        # What the transformer reads is made once per image, whatever the number of candidates.
        transformer = self.transformer
        scale_inputs = self.vqvae.teacher_forcing(codes)
        return lambda images, condition: token_log_probs(transformer, codes[images], scale_inputs[images], **condition)

    def _draw(
        self, call: CallSettings, condition: Condition, given: GivenCodes | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample all token maps: latents `(batch, channels, height, width)` and codes `(batch, length)`."""
        first_scale = 0 if given is None else given.num_scales
        settings = call.sampling
        state = CallState(settings.guidance_scale, len(self.vqvae.config.patch_nums) - first_scale)
        device, compiled = self._execution_device, self._compiled
        with (
            self._showing(state),
            scale_predictor(self.transformer, settings, condition, first_scale, device, compiled) as predictor,
            self.progress_bar(total=state.num_timesteps) as progress_bar,  # pyright: ignore
        ):
            sampling = ScaleSampling(self.vqvae, predictor, settings, call.generator, given)
            for step, k in enumerate(sampling.scales):
                if state.interrupt:
                    break
                logits = sampling.predict(k, state.guidance_scale)
                codes, content = sampling.sample(k, logits)
                sampling.add(k, codes, content)
                if call.callback_on_step_end is not None:
                    latents: Any = sampling.latents
                    sampling.replace_latents(k, self._call_back(call, step, k, latents))
                progress_bar.update()
        return sampling.latents, torch.cat(sampling.codes, dim=1)  # pyright: ignore[reportReturnType]

    def _call_back(self, call: CallSettings, step: int, k: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents from which the next scale continues, after the callback has seen them."""
        tensors = {
            name: latents if name == "latents" else self._images(latents, "pt")
            for name in call.callback_on_step_end_tensor_inputs
        }
        returned = call.callback_on_step_end(self, step, k, tensors)  # pyright: ignore
        changed = {"latents": latents} | returned if isinstance(returned, dict) else {"latents": latents}
        is_whole = isinstance(changed["latents"], torch.Tensor) and changed["latents"].shape == latents.shape
        if not isinstance(returned, dict | None) or not is_whole:
            raise ValueError(
                "`callback_on_step_end` must return `None` or a dictionary, in which `latents` has the shape "
                f"{tuple(latents.shape)}, got {returned!r}."
            )
        return changed["latents"]

    def _prepare(
        self,
        class_labels: Labels,
        options: Mapping[str, Any],
        condition: Condition | Callable[[CallSettings], Condition] | None = None,
        **sizes: int,
    ) -> Prepared:
        prepared = super()._prepare(class_labels, options, condition, **sizes)
        check_layers(self.transformer, prepared[0].sampling)
        return prepared


class VARPipeline(ScalePipeline):
    r"""
    Class-conditional and unconditional image generation with VAR (Tian et al. 2024): one step per scale, from a 1x1
    token map to the full grid.

    Args:
        transformer ([`VARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Turns token maps into images.
        guidance_scale (`float`, *optional*, defaults to 2.5):
            What `guidance_scale=None` means in a call. It travels with the checkpoint in `model_index.json`, like
            `top_p` and `temperature`: the best values depend on the model's data and training.
        top_p (`float`, *optional*, defaults to 0.96): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.

    Raises:
        `ValueError`: If the two models have different codebooks, latents or schedules, or a number is out of range.
    """

    def __init__(
        self,
        transformer: VARTransformer,
        vqvae: VQVAEModel,
        guidance_scale: float = CHECKPOINT_DEFAULTS["guidance_scale"],
        top_p: float = CHECKPOINT_DEFAULTS["top_p"],
        temperature: float = CHECKPOINT_DEFAULTS["temperature"],
    ):
        super().__init__()
        check_components(transformer, vqvae, VARConfig)
        self.register_modules(transformer=transformer, vqvae=vqvae)
        self._set_defaults(guidance_scale, top_p, temperature)

    @show_options
    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, **options: Unpack[CallOptions]) -> Any:
        r"""
        Generate images.

        Args:
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names, one image each; `None` and -1 are unconditional.
            prompt (`str` or `list[str]`, *optional*):
                Labels as texts in place of `class_labels`, as servers send them: names or ids, as for
                [`~VARPipeline.get_label_ids`]. The empty text is unconditional.
            guidance_scale (`float` or `Callable`, *optional*, defaults to the checkpoint's, 2.5 if it has none):
                Classifier-free guidance at the last scale, 1 is off; it grows linearly from 1 at the first scale. The
                official code's `cfg` is `guidance_scale - 1`, so that its `cfg=1.5` is 2.5 here. A callable of the scale
                k and the number of scales K gives the weight of each scale; after the last one that is not 1, the
                unconditional half is not computed.
            top_k (`int` or list of them, *optional*):
                Sample from this many most likely codes. `None` means 900, or all of a smaller codebook; 0 means all. A
                list has one value per scale, here and below.
            top_p (`float` or list of them, *optional*, defaults to the checkpoint's, 0.96 if it has none):
                Sample from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Divides the guided logits: above 1 for more variety, below 1 for less.
            smooth (`bool`, *optional*, defaults to `False`):
                Mix code vectors instead of choosing one (official `more_smooth`): smoother images, worse metrics.
                The returned codes are the samples behind the mixtures.
            num_images_per_label (`int`, *optional*, defaults to 1):
                Images for each label, next to each other.
            num_images_per_prompt (`int`, *optional*, defaults to 1): The same under diffusers' name.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness, on any device. With a list, one for each image, an image does not depend on the
                others of its batch.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, k, k, {"latents": latents})`. It may return a dictionary with
                other `latents`, from which the next scale continues.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Tensors that the callback gets: `latents`, and `images` `(batch, channels, height, width)` in [0, 1],
                which are decoded for it.
            class_embeds (`torch.FloatTensor` of shape `(batch, condition_size)`, *optional*):
                Class embeddings in place of `class_labels`, see [`~VARPipeline.get_class_embeds`].
            logits_processor (`LogitsProcessor` or `LogitsProcessorList`, *optional*):
                transformers' interface: changes the guided logits of a scale before temperature and filters. Every token
                is a row: `input_ids` are the codes of the scales before, `scores` `(batch * length, codebook_size)`. A
                processor may also take `scale` and `previous_logits`, the guided logits of the scale before of shape
                `(batch, its length, codebook_size)`, `None` at the first.
            refiner ([`VARTransformer`], *optional*):
                Another, smaller transformer that samples the scales from `refiner_start` on (collaborative decoding, Chen
                et al. 2024): the many tokens of the last scales need less of a model. It reads the codes sampled before in
                one pass.
            refiner_start (`int`, *optional*): First scale of the `refiner`.
            layer_hooks (`list[LayerHook]`, *optional*):
                Changes of what the layers compute, which trade quality for time or memory: [`TokenPruning`], [`CacheBudget`]
                or others, see [`LayerHook`]. The models are not changed; with hooks, compiled ones run uncompiled.
            num_candidates (`int`, *optional*, defaults to 1):
                Number of candidates for each image; the one with the highest `score_fn` is kept (rejection sampling).
            score_fn (`Callable`, *optional*):
                Called as `score_fn(images, labels)` with images in [0, 1] and ids of all images of the call; returns a
                number for each.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is computed.
            `TypeError`: If an argument is unknown.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> images = pipe(class_labels=[3, 1, 4], generator=torch.Generator().manual_seed(0)).images
        ```
        """
        return self._generate(partial(self._prepare, class_labels, options))

    def get_class_embeds(self, labels: Labels) -> torch.Tensor:
        r"""
        Class embeddings of labels, for `class_embeds`: to go from one class to another, mix two of them by
        `torch.lerp`.

        Args:
            labels (`int`, `str`, `None`, `torch.Tensor` or a list of these): As for a call.

        Returns:
            `torch.FloatTensor` of shape `(batch, condition_size)`.

        Raises:
            `ValueError`: If a label is out of range, unknown or ambiguous, or the weights are offloaded.
        """
        return self.transformer.get_class_embeds(torch.tensor(self.get_label_ids(labels)))
