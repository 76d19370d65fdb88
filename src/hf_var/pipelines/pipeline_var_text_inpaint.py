# SPDX-License-Identifier: Apache-2.0
"""In-painting by a text: parts of images are sampled, the rest is kept."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput

from .options import TextCallOptions, show_options
from .pipeline_var_text import VARTextToImagePipeline


class VARTextInpaintPipeline(VARTextToImagePipeline):
    r"""
    In-painting and out-painting by a text, without training: what the mask keeps is given by the image's own tokens at
    every scale, the rest is sampled.

    Models and defaults are those of [`VARTextToImagePipeline`].
    """

    @show_options
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        paste_original: bool = False,
        feather_width: int | None = None,
        **options: Unpack[TextCallOptions],
    ) -> Any:
        r"""
        Repaint parts of images.

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts; one text serves all images.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                The images to edit, as of [`VARInpaintPipeline`]. A single image serves all prompts and masks.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                White is repainted, black is kept, as of [`VARInpaintPipeline`]. A single mask serves all images.
            paste_original (`bool`, *optional*, defaults to `False`):
                Whether black areas show the original pixels of the image (at the tokenizer's size).
            feather_width (`int`, *optional*, defaults to half a token):
                Goes with `paste_original`: number of pixels over which the original fades out inside of the white
                area; 0 for a hard edge.
            options:
                All other arguments of [`VARTextToImagePipeline`]. `num_images_per_prompt` counts edits for each
                prompt, image and mask, next to each other. Codes are sampled for kept positions as well, so that the
                mask does not shift the random numbers of the others. `score_fn` and the callback see images before
                `paste_original`.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields. At kept positions the codes are the image's.

        Raises:
            `ValueError`: If an argument is out of range, before anything is sampled.
        """
        return self._repaint(self._preparation(prompt, options), image, mask_image, paste_original, feather_width)
