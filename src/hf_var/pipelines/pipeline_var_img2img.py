# SPDX-License-Identifier: Apache-2.0
"""Variations of images: the coarse scales are kept, the finer ones are sampled."""

from functools import partial
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput

from .conditions import Labels
from .options import CallOptions, show_options
from .pipeline_var import VARPipeline


class VARImg2ImgPipeline(VARPipeline):
    r"""
    Variations of images with VAR: the token maps of the first scales, the composition, are the image's, those of the
    finer ones are sampled. With an image of few pixels this is super-resolution along the schedule.

    Models and defaults are those of [`VARPipeline`].
    """

    @show_options
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        class_labels: Labels = None,
        strength: float | None = None,
        num_kept_scales: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        r"""
        Keep the coarse scales of images and sample the finer ones.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                Source of the coarse scales. PIL images; arrays `(height, width, channels)` or
                `(batch, height, width, channels)` or tensors `(channels, height, width)` or
                `(batch, channels, height, width)` with values in [0, 1]. Images of another size are resized to the
                tokenizer's, whatever their aspect: PIL images with Lanczos' filter, arrays and tensors with nearest
                neighbours.
                A single image serves all labels.
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names; `None` and -1 are unconditional. A single label serves all images.
            strength (`float`, *optional*, defaults to 0.5):
                Share of the K scales that are sampled, in [0, 1]: the first `K - int(K * strength)` are kept. 0 is the
                reconstruction, for which the transformer is not called; 1 is what [`VARPipeline`] samples.
            num_kept_scales (`int`, *optional*): Their number itself, in place of `strength`.
            options:
                All other arguments of [`VARPipeline`]. Lists have a value for every scale, sampled or not;
                `num_images_per_label` counts variations for each label and image, next to each other. A callback is
                called after each sampled scale as `callback(pipe, step, k, {"latents": latents})`, where `step`
                counts these scales and `k` all. A `logits_processor` gets no `previous_logits` at the first sampled scale.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is sampled.

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
        prepare = partial(self._prepare, class_labels, options)
        return self._vary(prepare, image, strength, num_kept_scales)
