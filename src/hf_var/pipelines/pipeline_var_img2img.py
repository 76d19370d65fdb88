# SPDX-License-Identifier: Apache-2.0
"""Images drawn anew from the scales that are too fine to be kept."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from transformers import LogitsProcessor, LogitsProcessorList

from ..priors import VARTransformer
from .editing import check_num_scales, image_pixels
from .evaluation_mode import in_evaluation_mode
from .labels import Labels
from .pipeline_base import Scores, VARPipelineBase
from .pipeline_output import VARPipelineOutput
from .sampling import Generators
from .settings import Guidance, is_number, resolve_settings


DEFAULT_STRENGTH = 0.5


class VARImg2ImgPipeline(VARPipelineBase):
    r"""
    Variations of images with VAR: the token maps of the first scales, the composition, are the image's, those of the
    finer ones are drawn. With an image of few pixels this is super-resolution along the schedule.

    Args:
        transformer ([`VARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Turns images into token maps and back.
        guidance_scale (`float`, *optional*, defaults to 2.5): What `guidance_scale=None` means in a call.
        top_p (`float`, *optional*, defaults to 0.96): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.

    Raises:
        `ValueError`: If the two models have different codebooks, latents or schedules, or a number is out of range.
    """

    @torch.no_grad()
    @in_evaluation_mode
    def __call__(
        self,
        image: PipelineImageInput,
        class_labels: Labels = None,
        strength: float | None = None,
        num_kept_scales: int | None = None,
        guidance_scale: Guidance | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        smooth: bool = False,
        num_images_per_label: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - the signature of diffusers' pipelines
        class_embeds: torch.Tensor | None = None,
        logits_processor: LogitsProcessor | LogitsProcessorList | None = None,
        refiner: VARTransformer | None = None,
        refiner_start: int | None = None,
        num_candidates: int = 1,
        score_fn: Scores | None = None,
    ) -> VARPipelineOutput | tuple:
        r"""
        Draw the fine scales of images anew.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Where the coarse scales come from. Pictures; arrays `(height, width, channels)` or
                `(batch, height, width, channels)` or tensors `(channels, height, width)` or
                `(batch, channels, height, width)` with values in [0, 1]. What has another size is resized to the
                tokenizer's, whatever its aspect: pictures by Lanczos' filter, arrays and tensors to nearest neighbours.
                A single image serves all labels.
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names; `None` and -1 are unconditional. A single label serves all images.
            strength (`float`, *optional*, defaults to 0.5):
                Share of the K scales that are drawn, in [0, 1]: the first `K - int(K * strength)` are kept. 0 is the
                reconstruction, for which the transformer is not called; 1 is what [`VARPipeline`] draws.
            num_kept_scales (`int`, *optional*): Their number itself, in place of `strength`.
            guidance_scale, top_k, top_p, temperature, smooth:
                As in [`VARPipeline`]; lists have a value for every scale, drawn or not.
            num_images_per_label (`int`, *optional*, defaults to 1):
                Variations for each label and image, next to each other.
            generator, output_type, return_dict:
                As in [`VARPipeline`].
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale that is drawn as `callback(pipe, step, k, {"latents": latents})`, where `step`
                counts these scales and `k` all. It may return a dictionary with other `latents`, from which the next
                scale goes on.
            callback_on_step_end_tensor_inputs, class_embeds, logits_processor, refiner, refiner_start, num_candidates,
            score_fn:
                As in [`VARPipeline`]; for a `logits_processor` there are no `previous_logits` at the first scale that is
                drawn.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is drawn.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARImg2ImgPipeline, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> image = pipe(class_labels=3, generator=torch.Generator().manual_seed(0)).images[0]
        >>> vary = VARImg2ImgPipeline.from_pipe(pipe)  # the same weights
        >>> images = vary(image, class_labels=3, strength=0.6, num_images_per_label=4).images
        ```
        """
        settings = resolve_settings(
            self.transformer,
            self.config,
            guidance_scale,
            top_k,
            top_p,
            temperature,
            smooth,
            logits_processor,
            refiner,
            refiner_start,
        )
        first_scale = self._num_kept_scales(strength, num_kept_scales)
        pixels = image_pixels(image, self.vqvae.config, self.image_processor)
        ids, embeds, items = self._match_inputs(class_labels, class_embeds, num_images_per_label, image=len(pixels))
        callback = self._check_call(
            len(items["image"]), generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        latents, codes = self._draw_best(
            ids,
            embeds,
            settings,
            generator,
            num_candidates,
            score_fn,
            **callback,
            given_codes=self._encode_pixels(pixels)[items["image"]],
            first_scale=first_scale,
        )
        return self._output(self._images(latents, output_type), codes, return_dict)

    def _num_kept_scales(self, strength: float | None, num_kept_scales: int | None) -> int:
        num_scales = len(self.vqvae.config.patch_nums)
        if num_kept_scales is not None:
            if strength is not None:
                raise ValueError(
                    f"Pass one of `strength` and `num_kept_scales`, got {strength!r} and {num_kept_scales!r}."
                )
            check_num_scales("num_kept_scales", num_kept_scales, num_scales)
            return num_kept_scales
        strength = DEFAULT_STRENGTH if strength is None else strength
        if not is_number(strength) or not 0 <= strength <= 1:
            raise ValueError(f"`strength` must be in [0, 1], got {strength!r}.")
        return num_scales - int(num_scales * strength)
