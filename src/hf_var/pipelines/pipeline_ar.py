# SPDX-License-Identifier: Apache-2.0
"""Images from class labels, position by position: the loop over the levels, their rows and columns."""

from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any, Unpack

import torch
from torch import nn

from ..priors.likelihood import log_probs
from .base import CallState, PipelineBase, TokenScorer
from .checks import check_levels, check_output, checked_codes
from .conditions import Condition, Labels
from .editing import known_latents
from .options import ARCallOptions, CallSettings, last_guided_scale, show_options
from .predictor import RowPredictor
from .sampling import Guidance, Sampler, SamplingSettings


class ARPipeline(PipelineBase):
    r"""
    Class-conditional and unconditional image generation with priors that predict a token map position by position, in
    raster order: VQ-VAE with a PixelCNN (van den Oord et al. 2017), VQ-VAE-2 with a PixelSNAIL for each level (Razavi et
    al. 2019). The levels are sampled coarse to fine, each given the one before.

    Args:
        vqvae ([`HierarchicalVQVAEModel`] or [`VQVAEModel`]): Turns the token maps of all levels into images.
        prior ([`PixelCNN`] or [`PixelSNAIL`]): Predicts the only level, or the coarsest one.
        middle_prior ([`PixelSNAIL`], *optional*): Predicts the second of three levels.
        bottom_prior ([`PixelSNAIL`], *optional*): Predicts the finest of several levels.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            What `guidance_scale=None` means in a call, as for [`VARPipeline`]. Above 1 it needs priors that were trained
            with class dropout.
        top_p (`float`, *optional*, defaults to 1.0): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.

    Raises:
        `ValueError`: If the models do not belong together (there is not one prior for each level, or maps, codebooks or
            labels differ), or a number is out of range.
    """

    model_cpu_offload_seq = "prior->middle_prior->bottom_prior->vqvae"
    _optional_components = ["middle_prior", "bottom_prior"]
    call_options = ARCallOptions.__optional_keys__
    _callback_tensor_inputs = ["codes", "images"]

    def __init__(
        self,
        vqvae: nn.Module,
        prior: nn.Module,
        middle_prior: nn.Module | None = None,
        bottom_prior: nn.Module | None = None,
        guidance_scale: float = 1.0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_levels(vqvae, {"prior": prior, "middle_prior": middle_prior, "bottom_prior": bottom_prior})
        self.register_modules(vqvae=vqvae, prior=prior, middle_prior=middle_prior, bottom_prior=bottom_prior)
        self._set_defaults(guidance_scale, top_p, temperature)
        self._check_class_dropout(guidance_scale)

    @property
    def priors(self) -> list[Any]:
        return [prior for prior in (self.prior, self.middle_prior, self.bottom_prior) if prior is not None]

    @partial(show_options, callback_on_step_end_tensor_inputs=("codes",))
    @torch.no_grad()
    def __call__(self, class_labels: Labels = None, **options: Unpack[ARCallOptions]) -> Any:
        r"""
        Generate images.

        Args:
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names, one image each; `None` and -1 are unconditional.
            guidance_scale (`float` or `Callable`, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Classifier-free guidance of all positions, 1 is off. A callable of the level k and the number of levels K
                gives the weight of each level.
            top_k (`int` or list of them, *optional*):
                Sample from this many most likely codes. `None` means 900, or all of a smaller codebook; 0 means all. A
                list has one value per level, here and below.
            top_p (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Sample from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Divides the guided logits: above 1 for more variety, below 1 for less.
            logits_processor (`LogitsProcessor` or `LogitsProcessorList`, *optional*): As of [`VARPipeline`], for each code.
            num_images_per_label (`int`, *optional*, defaults to 1):
                Images for each label, next to each other.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness, on any device. With a list, one for each image, an image does not depend on the
                others of its batch.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for what `vqvae.decode` takes as `latents`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each row as `callback(pipe, step, k, tensors)` with the number of the row among those of all
                levels, and the level. It may set `pipe._interrupt`.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["codes"]`):
                Tensors that the callback gets: `codes`, all that are sampled so far, `(batch, their number)`, and
                `images` `(batch, channels, height, width)` in [0, 1], a preview in which missing codes count as vectors
                of zeros.
            num_candidates (`int`, *optional*, defaults to 1):
                Number of candidates for each image; the one with the highest `score_fn` is kept (rejection sampling, Razavi
                et al. 2019, section 3.4, keeps those that a classifier is sure of).
            score_fn (`Callable`, *optional*):
                Called as `score_fn(images, labels)` with images in [0, 1] and ids of all images of the call; returns a
                number for each.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, before anything is computed.
            `TypeError`: If an argument is unknown.
        """
        call, condition, _ = self._prepare(class_labels, options)
        with self._at_work():
            codes, _ = self._draw_best(call, condition)
            return self._output(call, self._images(codes, call.output_type), codes)

    @torch.no_grad()
    def decode_progress(self, codes: torch.Tensor, output_type: str = "pil") -> list:
        r"""
        The images after each level, coarse to fine; the vectors of finer levels are zeros.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images, such as a call returns.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list`: For each level the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If `codes` has the wrong shape or `output_type` is not supported.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt', got 'latent'.")
        codes = checked_codes("codes", codes, self.vqvae.config)
        ends = accumulate(self.vqvae.config.scale_lengths)
        with self._at_work() as device:
            return [self._images(codes[:, :end].to(device), output_type) for end in ends]

    def _prepare(
        self, class_labels: Labels, options: Mapping[str, Any], **sizes: int
    ) -> tuple[CallSettings, Condition, dict[str, list[int]]]:
        options = {"callback_on_step_end_tensor_inputs": ["codes"], **options}
        call, condition, items = super()._prepare(class_labels, options, **sizes)
        self.check_sampling(call.sampling)
        self._check_class_dropout(1.0, condition.class_labels)
        return call, condition, items

    def check_sampling(self, settings: SamplingSettings) -> None:
        self._check_class_dropout(settings.guidance_scale)

    def _check_class_dropout(self, guidance_scale: Guidance, class_labels: torch.Tensor | None = None) -> None:
        """Raise a `ValueError` if a prior is asked for what only class dropout teaches: to do without a class."""
        last_guided = last_guided_scale(guidance_scale, len(self.priors))
        for level, config in enumerate(prior.config for prior in self.priors):
            if not config.num_labels or config.class_dropout_prob > 0:
                continue
            if class_labels is not None and bool((class_labels == config.num_labels).any()):
                raise ValueError("`class_labels` must be classes: the prior was trained without class dropout.")
            if level <= last_guided:
                raise ValueError(
                    "`guidance_scale` must be 1 for a prior that was trained without class dropout, got "
                    f"{guidance_scale!r}."
                )

    def _draw(self, call: CallSettings, condition: Condition, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample the token maps of all levels: codes `(batch, length)`, twice."""
        sizes = self.vqvae.config.scale_sizes
        state = CallState(call.sampling.guidance_scale, num_timesteps=sum(height for height, _ in sizes))
        sampler = Sampler(call.sampling, call.generator, len(sizes))
        rows: list[torch.Tensor] = []
        with self._showing(state), self.progress_bar(total=state.num_timesteps) as progress_bar:  # pyright: ignore
            for k, (prior, (height, width)) in enumerate(zip(self.priors, sizes, strict=True)):
                coarser = torch.cat(rows[-sizes[k - 1][0] :], dim=1) if k > 0 else None
                predictor = self._predictor(prior, k, call, condition, coarser)
                for _ in range(height):
                    row = torch.zeros(len(condition), width, dtype=torch.long, device=self._execution_device)
                    for column in range(width):
                        logits = predictor.logits(row, column, _weight(state.guidance_scale, k, len(sizes)))
                        row[:, column : column + 1], _ = sampler.draw(logits, k, [*rows, row[:, :column]])
                    rows.append(row)
                    progress_bar.update()
                    if call.callback_on_step_end is not None:
                        self._call_back(call, len(rows) - 1, k, torch.cat(rows, dim=1))
                    if state.interrupt:
                        break
                if state.interrupt:
                    break
        codes = torch.cat(rows, dim=1)
        return codes, codes

    def _predictor(
        self, prior: Any, k: int, call: CallSettings, condition: Condition, coarser: torch.Tensor | None
    ) -> RowPredictor:
        """What predicts level `k`, given the `coarser` codes."""
        has_classes = bool(prior.config.num_labels)
        last_guided = last_guided_scale(call.sampling.guidance_scale, len(self.priors))
        guided = has_classes and not condition.is_unconditional and k <= last_guided
        arguments = condition.arguments(self._execution_device, guided) if has_classes else {}
        if coarser is not None:
            arguments["condition_codes"] = coarser.repeat(2, 1) if guided else coarser
        return RowPredictor(prior, arguments, guided)

    def _call_back(self, call: CallSettings, step: int, k: int, codes: torch.Tensor) -> None:
        make = {"codes": lambda: codes, "images": lambda: self._images(codes, "pt")}
        tensors = {name: make[name]() for name in call.callback_on_step_end_tensor_inputs}
        call.callback_on_step_end(self, step, k, tensors)  # pyright: ignore

    def _latents(self, content: torch.Tensor) -> Any:
        is_whole = content.shape[1] == sum(self.vqvae.config.scale_lengths)
        return self.vqvae.latents(content) if is_whole else known_latents(self.vqvae, content)

    def _scorer(self, codes: torch.Tensor) -> TokenScorer:
        levels = codes.split(self.vqvae.config.scale_lengths, dim=1)

        def score(images: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            found = []
            for prior, coarser, level in zip(self.priors, [None, *levels], levels, strict=False):
                arguments = {"class_labels": class_labels} if prior.config.num_labels else {}
                if coarser is not None:
                    arguments["condition_codes"] = coarser[images]
                found.append(log_probs(prior(codes=level[images], **arguments).logits, level[images]))
            return torch.cat(found, dim=1)

        return score


def _weight(guidance_scale: Guidance, k: int, num_levels: int) -> float:
    return guidance_scale(k, num_levels) if callable(guidance_scale) else guidance_scale
