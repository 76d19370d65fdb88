# SPDX-License-Identifier: Apache-2.0
"""Parts of images drawn anew."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from transformers import LogitsProcessor, LogitsProcessorList

from ..priors import VARTransformer
from .editing import given_tokens, image_pixels, mask_pixels, paste_kept
from .evaluation_mode import in_evaluation_mode
from .labels import Labels
from .pipeline_base import Scores, VARPipelineBase
from .pipeline_output import VARPipelineOutput
from .sampling import Generators
from .settings import Guidance, is_number, resolve_settings


class VARInpaintPipeline(VARPipelineBase):
    r"""
    In-painting, out-painting and class-conditional editing without training, as Tian et al. (2024) show them for VAR:
    what the mask keeps is given by the image's own tokens at every scale, the rest is drawn.

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
        mask_image: PipelineImageInput,
        class_labels: Labels = None,
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
        paste_original: bool = False,
        feather_width: int | None = None,
    ) -> VARPipelineOutput | tuple:
        r"""
        Draw parts of images anew.

        The mask is reduced to the finest token map, where a token is drawn if at least half of its pixels are white, and
        from there to the coarser maps. Maps of up to three tokens are always the image's own: even under a mask that is
        white all over the image decides on the rough colours, so this is not what [`VARPipeline`] draws. A mask that is
        black all over gives the reconstruction. The kept part, too, has gone through the tokenizer; `paste_original` has
        its pixels instead.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                What is edited. Pictures; arrays `(height, width, channels)` or `(batch, height, width, channels)` or
                tensors `(channels, height, width)` or `(batch, channels, height, width)` with values in [0, 1]. What has
                another size is resized to the tokenizer's, whatever its aspect: pictures by Lanczos' filter, arrays and
                tensors to nearest neighbours. A single image serves all labels and masks.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                White is repainted, black is kept. Pictures, which are turned to grey; arrays `(height, width)`,
                `(height, width, 1)`, `(batch, height, width)` or `(batch, height, width, 1)`; or tensors
                `(height, width)`, `(batch, height, width)` or `(batch, 1, height, width)`, with values in [0, 1] or truth
                values. It need not have the image's size and is resized like it. Shades of grey are cut off at one half,
                with a warning. A single mask serves all images.
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names; `None` and -1 are unconditional. A single label serves all images.
            guidance_scale, top_k, top_p, temperature, smooth:
                As in [`VARPipeline`].
            num_images_per_label (`int`, *optional*, defaults to 1):
                Edits for each label, image and mask, next to each other.
            generator, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs, class_embeds,
            logits_processor, refiner, refiner_start, num_candidates, score_fn:
                As in [`VARPipeline`]. Codes are drawn for kept positions as well, so that the mask does not shift the
                random numbers of the others. `score_fn` and the callback see images before `paste_original`.
            paste_original (`bool`, *optional*, defaults to `False`):
                Whether black areas show the very pixels of the image (at the tokenizer's size).
            feather_width (`int`, *optional*, defaults to half a token):
                Goes with `paste_original`: over so many pixels the original fades out inside of the white area; 0 for a
                hard edge.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields. At kept positions the codes are the image's.

        Raises:
            `ValueError`: If an argument is out of range, before anything is drawn.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARInpaintPipeline, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> image = pipe(class_labels=3, generator=torch.Generator().manual_seed(0)).images[0]
        >>> mask_image = torch.zeros(16, 16)
        >>> mask_image[:, :8] = 1  # the left half is drawn anew
        >>> edit = VARInpaintPipeline.from_pipe(pipe)  # the same weights
        >>> image = edit(image, mask_image, class_labels=8, generator=torch.Generator().manual_seed(0)).images[0]
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
        config = self.vqvae.config
        feather_width = self._check_pasting(paste_original, feather_width, output_type)
        pixels = image_pixels(image, config, self.image_processor)
        mask = mask_pixels(mask_image, config)
        ids, embeds, items = self._match_inputs(
            class_labels, class_embeds, num_images_per_label, image=len(pixels), mask_image=len(mask)
        )
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
            is_given=given_tokens(mask, config)[items["mask_image"]].to(self._execution_device),
        )
        if not paste_original:
            return self._output(self._images(latents, output_type), codes, return_dict)
        sample = self._decode(latents)
        pixels, mask = pixels[items["image"]].to(sample.device), mask[items["mask_image"]].to(sample.device)
        sample = paste_kept(sample, pixels, mask, feather_width)
        return self._output(self.image_processor.postprocess(sample, output_type=output_type), codes, return_dict)

    def _check_pasting(self, paste_original: bool, feather_width: int | None, output_type: str) -> int:
        """The width that holds in place of `None`."""
        config = self.vqvae.config
        if feather_width is not None and not paste_original:
            raise ValueError(f"`feather_width` = {feather_width!r} needs `paste_original=True`.")
        if paste_original and output_type == "latent":
            raise ValueError("`paste_original` needs images, got output_type='latent'.")
        if paste_original and config.in_channels != config.num_output_channels:
            raise ValueError(
                f"`paste_original` needs a tokenizer that returns the {config.in_channels} channels which it reads, got "
                f"{config.num_output_channels}."
            )
        if feather_width is None:
            return config.downsampling_factor // 2
        if not is_number(feather_width, Integral) or feather_width < 0:
            raise ValueError(f"`feather_width` must be an integer of at least 0, got {feather_width!r}.")
        return feather_width
