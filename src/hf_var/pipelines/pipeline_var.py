# SPDX-License-Identifier: Apache-2.0
"""Images from class labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from transformers import LogitsProcessor, LogitsProcessorList

from ..priors import VARTransformer
from .evaluation_mode import in_evaluation_mode
from .labels import Labels
from .pipeline_base import Scores, VARPipelineBase
from .pipeline_output import VARPipelineOutput
from .sampling import Generators
from .settings import Guidance, resolve_settings


class VARPipeline(VARPipelineBase):
    r"""
    Class-conditional and unconditional image generation with VAR (Tian et al. 2024): one step per scale, from a 1x1
    token map to the full grid.

    Args:
        transformer ([`VARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Turns token maps into images.
        guidance_scale (`float`, *optional*, defaults to 2.5):
            What `guidance_scale=None` means in a call. It travels with the checkpoint in `model_index.json`, like
            `top_p` and `temperature`: what suits a model depends on its data and training.
        top_p (`float`, *optional*, defaults to 0.96): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.

    Raises:
        `ValueError`: If the two models have different codebooks, latents or schedules, or a number is out of range.
    """

    @torch.no_grad()
    @in_evaluation_mode
    def __call__(
        self,
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
    ) -> VARPipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names, one image each; `None` and -1 are unconditional.
            guidance_scale (`float` or `Callable`, *optional*, defaults to the checkpoint's, 2.5 if it has none):
                Classifier-free guidance at the last scale, 1 is off; it grows linearly from 1 at the first scale. The
                official code's `cfg` is `guidance_scale - 1`, so that its `cfg=1.5` is 2.5 here. A callable of the scale
                k and the number of scales K gives the weight of each scale; after the last one that is not 1, the
                unconditional half is not computed.
            top_k (`int` or list of them, *optional*):
                Draw from this many most likely codes. `None` means 900, or all of a smaller codebook; 0 means all. A
                list has one value per scale, here and below.
            top_p (`float` or list of them, *optional*, defaults to the checkpoint's, 0.96 if it has none):
                Draw from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Divides the guided logits: above 1 for more variety, below 1 for less.
            smooth (`bool`, *optional*, defaults to `False`):
                Mix code vectors instead of choosing one (official `more_smooth`): smoother pictures, worse metrics.
                The returned codes are the draws behind the mixtures.
            num_images_per_label (`int`, *optional*, defaults to 1):
                Images for each label, next to each other.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness, on any device. With a list, one for each image, an image does not depend on the
                others of its batch.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, k, k, {"latents": latents})`. It may return a dictionary with
                other `latents`, from which the next scale goes on.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Tensors that the callback gets: `latents`, and `images` `(batch, channels, height, width)` in [0, 1],
                which are decoded for it.
            class_embeds (`torch.FloatTensor` of shape `(batch, hidden_size)`, *optional*):
                Class embeddings in place of `class_labels`, see [`~VARPipeline.get_class_embeds`].
            logits_processor (`LogitsProcessor` or `LogitsProcessorList`, *optional*):
                transformers' interface: changes the guided logits of a scale before temperature and filters. Every token
                is a row: `input_ids` are the codes of the scales before, `scores` `(batch * length, codebook_size)`. A
                processor may also take `scale` and `previous_logits`, the guided logits of the scale before of shape
                `(batch, its length, codebook_size)`, `None` at the first.
            refiner ([`VARTransformer`], *optional*):
                Another, smaller transformer that draws the scales from `refiner_start` on (collaborative decoding, Chen
                et al. 2024): the many tokens of the last scales need less of a model. It reads what was drawn before in
                one pass.
            refiner_start (`int`, *optional*): First scale of the `refiner`.
            num_candidates (`int`, *optional*, defaults to 1):
                Draw each image so often and keep the one that `score_fn` finds best (rejection sampling).
            score_fn (`Callable`, *optional*):
                Called as `score_fn(images, labels)` with images in [0, 1] and ids of all images of the call; returns a
                number for each, the higher the better.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is computed.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> images = pipe(class_labels=[3, 1, 4], generator=torch.Generator().manual_seed(0)).images
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
        ids, embeds, batch_size = self._class_inputs(class_labels, class_embeds, num_images_per_label)
        callback = self._check_call(
            batch_size, generator, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        latents, codes = self._draw_best(
            ids,
            embeds,
            settings,
            generator,
            num_candidates,
            score_fn,
            **callback,
        )
        return self._output(self._images(latents, output_type), codes, return_dict)
