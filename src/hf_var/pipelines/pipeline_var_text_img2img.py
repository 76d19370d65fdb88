# SPDX-License-Identifier: Apache-2.0
"""Variations of images by a text: the coarse scales are kept, the finer ones are sampled."""

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput

from .options import TextCallOptions, show_options
from .pipeline_var_text import VARTextToImagePipeline


class VARTextImg2ImgPipeline(VARTextToImagePipeline):
    r"""
    Variations of images by a text: the token maps of the first scales, the composition, are the image's, those of the
    finer ones are sampled. With an image of few pixels this is super-resolution along the schedule.

    Models and defaults are those of [`VARTextToImagePipeline`].
    """

    @show_options
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float | None = None,
        num_kept_scales: int | None = None,
        **options: Unpack[TextCallOptions],
    ) -> Any:
        r"""
        Keep the coarse scales of images and sample the finer ones.

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts; one text serves all images.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Source of the coarse scales, as of [`VARImg2ImgPipeline`]. A single image serves all prompts.
            strength (`float`, *optional*, defaults to 0.5):
                Share of the K scales that are sampled, in [0, 1]: the first `K - int(K * strength)` are kept. 0 is the
                reconstruction, for which the transformer is not called; 1 is what [`VARTextToImagePipeline`] samples.
            num_kept_scales (`int`, *optional*): Their number itself, in place of `strength`.
            options:
                All other arguments of [`VARTextToImagePipeline`]. Lists have a value for every scale, sampled or not;
                `num_images_per_prompt` counts variations for each prompt and image, next to each other. A callback is
                called after each sampled scale as `callback(pipe, step, k, {"latents": latents})`, where `step` counts
                these scales and `k` all.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is sampled.
        """
        return self._vary(self._preparation(prompt, options), image, strength, num_kept_scales)
