# SPDX-License-Identifier: Apache-2.0
"""What all pipelines do: from labels, and perhaps codes that are given, to codes, latents and images."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor

from ..autoencoders import VQVAEModel
from ..priors import VARCache, VARTransformer
from .checks import check_components
from .compilation import CompilationMixin
from .editing import EditingMixin
from .evaluation_mode import in_evaluation_mode
from .labels import Labels, label_ids
from .lora import LoraMixin
from .pipeline_output import VARPipelineOutput
from .sampling import (
    Generators,
    apply_guidance,
    draw_codes,
    filter_logits,
    guidance_weight,
    process_logits,
    smooth_weights,
)
from .settings import (
    SamplingSettings,
    check_count,
    check_generator,
    check_guidance,
    check_output,
    check_temperature,
    check_top_p,
    is_number,
)


Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class VARPipelineBase(CompilationMixin, EditingMixin, LoraMixin):
    r"""
    Components, labels and the loop over the scales, for [`VARPipeline`], which describes the arguments, and the
    pipelines that edit images.
    """

    # The tokenizer is small and works between the scales: outside the chain it is loaded once per call.
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents", "images"]

    def __init__(
        self,
        transformer: VARTransformer,
        vqvae: VQVAEModel,
        guidance_scale: float = 2.5,
        top_p: float = 0.96,
        temperature: float = 1.0,
    ):
        super().__init__()
        check_components(transformer, vqvae)
        if callable(guidance_scale):
            raise ValueError("`guidance_scale` of a pipeline must be a number, which its configuration can hold.")
        check_guidance(guidance_scale)
        check_top_p(top_p)
        check_temperature(temperature)
        self.register_modules(transformer=transformer, vqvae=vqvae)
        # As Python's floats: numpy's are no JSON.
        self.register_to_config(
            guidance_scale=float(guidance_scale), top_p=float(top_p), temperature=float(temperature)
        )
        self._guidance_scale = guidance_scale
        # No image has 0 channels; tensors of 4, RGBA that is, would pass for latents otherwise and stay as they are.
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=vqvae.config.downsampling_factor, vae_latent_channels=0
        )

    @property
    def guidance_scale(self) -> float | Callable[[int, int], float]:
        """
        The current guidance scale. A callback may change it between the scales by setting `pipe._guidance_scale`,
        unless the call began at 1, where no unconditional logits are computed.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call: the scales that it draws."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the remaining scales are left out; a callback sets `pipe._interrupt`."""
        return self._interrupt

    def get_label_ids(self, labels: Labels) -> list[int]:
        r"""
        Ids of class labels.

        Args:
            labels (`int`, `str`, `None`, `torch.Tensor` or a list of these):
                Ids, names of `transformer.config.id2label` or their comma-separated synonyms; `None` and -1 are
                unconditional.

        Returns:
            `list[int]`, where the number of labels stands for unconditional.

        Raises:
            `ValueError`: If a label is out of range, unknown (the message suggests near names) or ambiguous.
        """
        return label_ids(labels, self.transformer.config.id2label)

    def get_class_embeds(self, labels: Labels) -> torch.Tensor:
        r"""
        Class embeddings of labels, for `class_embeds`: to go from one class to another, mix two of them by `torch.lerp`.

        Args:
            labels (`int`, `str`, `None`, `torch.Tensor` or a list of these): As for a call.

        Returns:
            `torch.FloatTensor` of shape `(batch, hidden_size)`.

        Raises:
            `ValueError`: If a label is out of range, unknown or ambiguous, or the weights are offloaded.
        """
        return self.transformer.get_class_embeds(torch.tensor(self.get_label_ids(labels)))

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs) -> None:
        r"""
        Offload groups of the transformer's layers, see diffusers' `DiffusionPipeline.enable_group_offload`. The vqvae
        stays on the device: it is small, and it works between the scales.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
        super().enable_group_offload(*args, exclude_modules=[*excluded, "vqvae"], **kwargs)

    @torch.no_grad()
    @in_evaluation_mode
    def decode_progress(self, codes: torch.Tensor, output_type: str = "pil") -> list:
        r"""
        The images after each scale, coarse to fine.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images, such as a call returns.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list`: For each scale the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If `codes` are no codes of whole images or the form is another.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt', got 'latent'.")
        codes = codes.to(self._execution_device)
        numbers = range(1, len(self.vqvae.config.patch_nums) + 1)
        samples = [self.vqvae.decode(codes, num_scales=number).sample for number in numbers]
        self.maybe_free_model_hooks()
        return [self.image_processor.postprocess(sample, output_type=output_type) for sample in samples]

    # ----------------------------------------------------------------------------------------------------------------
    # The parts of a call

    def _class_inputs(
        self, class_labels: Labels, class_embeds: torch.Tensor | None, num_images_per_label: int
    ) -> tuple[list[int] | None, torch.Tensor | None, int]:
        """Ids or embeddings of all images, and their number."""
        check_count("num_images_per_label", num_images_per_label)
        if class_embeds is None:
            ids = [label for label in self.get_label_ids(class_labels) for _ in range(num_images_per_label)]
            return ids, None, len(ids)
        if class_labels is not None:
            raise ValueError("Pass one of `class_labels` and `class_embeds`, not both.")
        width = self.transformer.config.condition_size
        if not isinstance(class_embeds, torch.Tensor) or class_embeds.ndim != 2 or class_embeds.shape[1] != width:
            shape = (
                tuple(class_embeds.shape) if isinstance(class_embeds, torch.Tensor) else type(class_embeds).__name__
            )
            raise ValueError(f"`class_embeds` must have the shape (batch, {width}), got {shape}.")
        embeds = class_embeds.repeat_interleave(num_images_per_label, dim=0)
        return None, embeds, len(embeds)

    def _check_call(
        self,
        batch_size: int,
        generator: Generators,
        output_type: str,
        callback: Any,
        callback_tensor_inputs: list[str],
    ) -> dict[str, Any]:
        """The callback's part of the arguments of [`VARPipelineBase._draw`]."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            callback_tensor_inputs = callback.tensor_inputs
        check_generator(generator, batch_size)
        check_output(output_type, self.vqvae.config.num_output_channels)
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        return {"callback": callback, "callback_tensor_inputs": callback_tensor_inputs}

    def _draw(
        self,
        ids: list[int] | None,
        class_embeds: torch.Tensor | None,
        settings: SamplingSettings,
        generator: Generators,
        callback: Callable | None = None,
        callback_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        given_codes: torch.Tensor | None = None,
        is_given: torch.Tensor | None = None,
        first_scale: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draw the token maps of all scales.

        Args:
            ids (`list[int]`, *optional*): Label of each image; the number of labels is unconditional.
            class_embeds (`torch.Tensor` of shape `(batch, hidden_size)`, *optional*): In place of `ids`.
            settings ([`SamplingSettings`]): How codes are drawn.
            generator (`torch.Generator` or a list of them, *optional*): Source of randomness.
            callback (`Callable`, *optional*): Called after each scale that is drawn.
            callback_tensor_inputs (`list[str]`, *optional*): What it gets.
            given_codes (`torch.LongTensor` of shape `(batch, length)`, *optional*): Codes of other images.
            is_given (`torch.BoolTensor` of shape `(batch or 1, length)`, *optional*):
                Where they stand in place of what is drawn, which is drawn all the same.
            first_scale (`int`, *optional*, defaults to 0):
                Scales before it are given as a whole and not drawn; the model reads them in one pass.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Latents `(batch, channels, height, width)` and codes `(batch, length)`.
        """
        config, device = self.transformer.config, self._execution_device
        num_scales = len(config.patch_nums)
        self._guidance_scale = settings.guidance_scale
        self._num_timesteps = num_scales - first_scale
        self._interrupt = False
        last_guided = self._last_guided_scale(ids, settings.guidance_scale, num_scales)
        draws = first_scale < num_scales
        conditions = self._conditions(ids, class_embeds, guided=last_guided >= 0) if draws else {}
        batch_size = len(ids) if ids is not None else len(class_embeds)  # pyright: ignore[reportArgumentType]

        model, num_cached = self.transformer, 0
        latents: torch.Tensor | None = None
        scale_inputs: list[torch.Tensor | None] = [None]
        codes: list[torch.Tensor] = []
        previous_logits: torch.Tensor | None = None
        given = [] if given_codes is None else given_codes.split(config.scale_lengths, dim=1)
        here = [] if is_given is None else is_given.split(config.scale_lengths, dim=1)
        for k in range(first_scale):
            codes.append(given[k])
            latents, following = self.vqvae.next_scale(latents, codes[-1], k)
            scale_inputs.append(following)
        with (
            self._cache_for(conditions) as cache,
            self.progress_bar(total=self.num_timesteps) as progress_bar,  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        ):
            for k in range(first_scale, num_scales):
                if self.interrupt:
                    break
                if settings.refiner is not None and k == max(settings.refiner_start, first_scale):
                    model, cache, num_cached = settings.refiner, VARCache(settings.refiner.config), 0
                guided = k <= last_guided
                if k == last_guided + 1 and num_cached > 0 and last_guided >= 0:
                    # No later scale is guided: the unconditional half has no reader any more.
                    cache.batch_select_indices(torch.arange(batch_size, device=device))
                # All blocks that this model has not read yet: the next one, or all when it begins.
                blocks = [block for block in scale_inputs[num_cached : k + 1] if block is not None]
                read = torch.cat(blocks, dim=1) if blocks else None
                if guided and read is not None:
                    read = read.repeat(2, 1, 1)
                # The cache knows the class after the first call.
                begin = conditions if num_cached == 0 else {}
                begin = {name: value if guided else value[:batch_size] for name, value in begin.items()}
                step = self._step(model, cache, k, num_cached)
                logits = step(**begin, scale_inputs=read, past_key_values=cache).logits
                logits = logits[:, -config.scale_lengths[k] :]
                num_cached = k + 1
                if guided:
                    logits = apply_guidance(logits, guidance_weight(self.guidance_scale, k, num_scales))
                if settings.logits_processor is not None:
                    guided_logits = logits
                    logits = process_logits(settings.logits_processor, codes, logits, k, previous_logits)
                    previous_logits = guided_logits
                # (batch, length of the scale, codebook_size)
                logits = filter_logits(logits / settings.temperature[k], settings.top_k[k], settings.top_p[k])
                drawn = draw_codes(logits, generator)
                mixed = None
                if settings.smooth:
                    mixed = self.vqvae.mix_code_vectors(smooth_weights(logits, k, num_scales, generator))
                if here:
                    drawn = torch.where(here[k], given[k], drawn)
                    if mixed is not None:
                        mixed = torch.where(here[k][..., None], self.vqvae.code_vectors(given[k]), mixed)
                codes.append(drawn)
                latents, following = self.vqvae.next_scale(latents, drawn if mixed is None else mixed, k)
                if callback is not None:
                    latents = self._call_back(callback, callback_tensor_inputs, k - first_scale, k, latents)  # pyright: ignore[reportArgumentType]
                    following = self.vqvae.scale_inputs(latents, k + 1) if k + 1 < num_scales else None
                scale_inputs.append(following)
                progress_bar.update()
        return latents, torch.cat(codes, dim=1)  # pyright: ignore[reportReturnType]

    def _draw_best(
        self,
        ids: list[int] | None,
        class_embeds: torch.Tensor | None,
        settings: SamplingSettings,
        generator: Generators,
        num_candidates: int,
        score_fn: Scores | None,
        **options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `num_candidates` draws of each image the one that `score_fn` finds best, as [`VARPipelineBase._draw`]."""
        check_count("num_candidates", num_candidates)
        if (num_candidates > 1) != (score_fn is not None):
            raise ValueError(
                f"`num_candidates` above 1 and `score_fn` go together, got {num_candidates} and {score_fn!r}."
            )
        if score_fn is None:
            return self._draw(ids, class_embeds, settings, generator, **options)
        num_labels = self.transformer.config.num_labels
        batch_size = len(ids) if ids is not None else len(class_embeds)  # pyright: ignore[reportArgumentType]
        labels = torch.tensor([num_labels] * batch_size if ids is None else ids)
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        best_scores = torch.empty(0)
        for _ in range(num_candidates):
            latents, codes = self._draw(ids, class_embeds, settings, generator, **options)
            scores = torch.as_tensor(score_fn(self._images(latents, "pt"), labels.to(latents.device))).detach()
            if scores.shape != (batch_size,) or not scores.isfinite().all():
                raise ValueError(
                    f"`score_fn` must return {batch_size} finite numbers, one per image, got {tuple(scores.shape)}: {scores}."
                )
            scores = scores.to(latents.device)
            if best is None:
                best, best_scores = (latents, codes), scores
                continue
            better = scores > best_scores
            best = (
                torch.where(better[:, None, None, None], latents, best[0]),
                torch.where(better[:, None], codes, best[1]),
            )
            best_scores = torch.where(better, scores, best_scores)
        return best  # pyright: ignore[reportReturnType]

    def _images(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents as images in the form that was asked for."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decode(latents), output_type=output_type)

    def _output(self, images: Any, codes: torch.Tensor, return_dict: bool) -> VARPipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return VARPipelineOutput(images=images, codes=codes) if return_dict else (images, codes)

    def _last_guided_scale(self, ids: list[int] | None, guidance_scale: Any, num_scales: int) -> int:
        """The last scale whose weight is not 1, -1 if there is none: until then, the unconditional half is computed."""
        if ids is not None and all(label == self.transformer.config.num_labels for label in ids):
            return -1
        if not callable(guidance_scale):
            # A callback may change it.
            return num_scales - 1 if guidance_scale != 1 else -1
        weights = [guidance_scale(k, num_scales) for k in range(num_scales)]
        for k, weight in enumerate(weights):
            if not is_number(weight):
                raise ValueError(
                    f"`guidance_scale` must return a finite number, got {weight!r} for ({k}, {num_scales})."
                )
        return max((k for k, weight in enumerate(weights) if weight != 1), default=-1)

    def _conditions(
        self, ids: list[int] | None, class_embeds: torch.Tensor | None, guided: bool
    ) -> dict[str, torch.Tensor]:
        """The class as arguments of the transformer, with an unconditional half behind it if `guided`."""
        device = self._execution_device
        unconditional = self.transformer.config.num_labels
        if ids is not None:
            return {"class_labels": torch.tensor(ids + [unconditional] * len(ids) if guided else ids, device=device)}
        embeds = class_embeds.to(device)  # pyright: ignore[reportOptionalMemberAccess]
        if guided:
            nothing = self.transformer.get_class_embeds(torch.full((len(embeds),), unconditional)).to(embeds)
            embeds = torch.cat([embeds, nothing])
        return {"class_embeds": embeds}

    def _call_back(
        self, callback: Callable, names: tuple[str, ...] | list[str], step: int, k: int, latents: torch.Tensor
    ) -> torch.Tensor:
        available = {"latents": lambda: latents, "images": lambda: self._images(latents, "pt")}
        returned = callback(self, step, k, {name: available[name]() for name in names}) or {}
        return returned.pop("latents", latents)
