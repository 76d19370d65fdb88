# SPDX-License-Identifier: Apache-2.0
"""In-painting: parts of images are sampled, the rest is kept."""

from functools import partial
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput

from .conditions import Labels
from .options import CallOptions, show_options
from .pipeline_var import VARPipeline


class VARInpaintPipeline(VARPipeline):
    r"""
    In-painting, out-painting and class-conditional editing without training, as Tian et al. (2024) show them for VAR:
    what the mask keeps is given by the image's own tokens at every scale, the rest is sampled.

    Models and defaults are those of [`VARPipeline`].
    """

    @show_options
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        mask_image: PipelineImageInput,
        class_labels: Labels = None,
        paste_original: bool = False,
        feather_width: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        r"""
        Repaint parts of images.

        The mask is reduced to the finest token map, where a token is repainted if at least half of its pixels are white,
        and from there to the coarser maps. Maps of up to three tokens always come from the image: even under a mask that
        is white all over they determine the rough colours, so the result differs from that of [`VARPipeline`]. A mask that
        is black all over gives the reconstruction. The kept part also goes through the tokenizer; `paste_original` pastes
        its original pixels instead.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                The images to edit. PIL images; arrays `(height, width, channels)` or `(batch, height, width, channels)`;
                or tensors `(channels, height, width)` or `(batch, channels, height, width)` with values in [0, 1]. Images
                of another size are resized to the tokenizer's, whatever their aspect: PIL images with Lanczos' filter,
                arrays and tensors with nearest neighbours. A single image serves all labels and masks.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                White is repainted, black is kept. PIL images, which are converted to grey; arrays `(height, width)`,
                `(height, width, 1)`, `(batch, height, width)` or `(batch, height, width, 1)`; or tensors
                `(height, width)`, `(batch, height, width)` or `(batch, 1, height, width)`, with values in [0, 1] or truth
                values. It need not have the image's size and is resized like it. Shades of grey are cut off at one half,
                with a warning. A single mask serves all images.
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names; `None` and -1 are unconditional. A single label serves all images.
            paste_original (`bool`, *optional*, defaults to `False`):
                Whether black areas show the original pixels of the image (at the tokenizer's size).
            feather_width (`int`, *optional*, defaults to half a token):
                Goes with `paste_original`: number of pixels over which the original fades out inside of the white area; 0
                for a hard edge.
            options:
                All other arguments of [`VARPipeline`]. `num_images_per_label` counts edits for each label, image and mask,
                next to each other. Codes are sampled for kept positions as well, so that the mask does not shift the random
                numbers of the others. `score_fn` and the callback see images before `paste_original`.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields. At kept positions the codes are the image's.

        Raises:
            `ValueError`: If an argument is out of range, before anything is sampled.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARInpaintPipeline, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> image = pipe(class_labels=3, generator=torch.Generator().manual_seed(0)).images[0]
        >>> mask_image = torch.zeros(16, 16)
        >>> mask_image[:, :8] = 1  # the left half is repainted
        >>> edit = VARInpaintPipeline.from_pipe(pipe)  # the same weights
        >>> image = edit(image, mask_image, class_labels=8, generator=torch.Generator().manual_seed(0)).images[0]
        ```
        """
        prepare = partial(self._prepare, class_labels, options)
        return self._repaint(prepare, image, mask_image, paste_original, feather_width)
