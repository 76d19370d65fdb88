# SPDX-License-Identifier: Apache-2.0
"""Images from labels, prompts or other images, code by code: the loop over the codes in raster order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..priors import RQTransformerConfig, VARConfig
from ..priors.likelihood import level_log_probs, stack_log_probs, token_log_probs
from .base import CallState, PipelineBase, TokenScorer
from .canvas import Canvas, make_canvas
from .checks import check_output, checked_codes
from .components import check_priors
from .condition_inputs import given_ids, prompt_ids
from .conditions import Condition, Labels, ids_condition, knows_unconditional
from .editing import known_latents
from .images import image_pixels
from .options import ARCallOptions, CallSettings, show_options
from .raster import LevelsPredictor, RasterPredictor, StackPredictor, TokenPredictor, WindowPredictor
from .sampling import Guidance, Sampler, SamplingSettings, last_guided_scale


class ARPipeline(PipelineBase):
    r"""
    Image generation with priors that predict one code after the other in raster order: VQ-VAE with a PixelCNN (van den Oord
    et al. 2017), VQ-VAE-2 with a PixelSNAIL for each level (Razavi et al. 2019), VQGAN with its GPT (Esser et al. 2021),
    RQ-VAE with an RQ-Transformer (Lee et al. 2022), and a VAR transformer of raster order (`VARConfig.is_raster`).

    Args:
        vqvae ([`VQVAEModel`] or [`HierarchicalVQVAEModel`]): Turns codes into images.
        prior ([`PixelCNN`], [`PixelSNAIL`], [`RQTransformer`] or [`VARTransformer`]):
            Predicts the codes. A prior of convolutions predicts one level, the coarsest.
        middle_prior ([`PixelSNAIL`], *optional*): Predicts the second of three levels.
        bottom_prior ([`PixelSNAIL`], *optional*): Predicts the finest of several levels.
        condition_vqvae ([`VQVAEModel`] or [`HierarchicalVQVAEModel`], *optional*):
            Turns `condition_image` into the condition tokens of an [`RQTransformer`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Turns `prompt` into the condition tokens of an [`RQTransformer`].
        guidance_scale (`float`, *optional*, defaults to 1.0):
            What `guidance_scale=None` means in a call, as for [`VARPipeline`]. Other values than 1 need priors that were
            trained with class dropout.
        top_p (`float`, *optional*, defaults to 1.0): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.

    Raises:
        `ValueError`: If the models do not belong together (there is not one prior for each level, or maps, codebooks or
            labels differ), or a number is out of range.
    """

    model_cpu_offload_seq = "condition_vqvae->prior->middle_prior->bottom_prior->vqvae"
    _optional_components = ["middle_prior", "bottom_prior", "condition_vqvae", "tokenizer"]
    call_options = ARCallOptions.__optional_keys__
    scored_conditions = ("class_embeds", "prompt", "condition_image", "condition_codes")
    _callback_tensor_inputs = ["codes", "images"]

    def __init__(
        self,
        vqvae: nn.Module,
        prior: nn.Module,
        middle_prior: nn.Module | None = None,
        bottom_prior: nn.Module | None = None,
        condition_vqvae: nn.Module | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        guidance_scale: float = 1.0,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ):
        super().__init__()
        priors = {"prior": prior, "middle_prior": middle_prior, "bottom_prior": bottom_prior}
        check_priors(vqvae, priors, condition_vqvae, tokenizer)
        self.register_modules(vqvae=vqvae, **priors, condition_vqvae=condition_vqvae, tokenizer=tokenizer)
        self._set_defaults(guidance_scale, top_p, temperature)
        self._check_unconditional(guidance_scale)

    @property
    def priors(self) -> list[Any]:
        return [prior for prior in (self.prior, self.middle_prior, self.bottom_prior) if prior is not None]

    @partial(show_options, callback_on_step_end_tensor_inputs=("codes",))
    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        prompt: str | Sequence[str] | None = None,
        condition_image: PipelineImageInput | None = None,
        condition_codes: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        num_given_rows: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[ARCallOptions],
    ) -> Any:
        r"""
        Generate images.

        Args:
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names, one image each; `None` and -1 are unconditional.
            prompt (`str` or `list[str]`, *optional*):
                Texts, one image each, for a model with a `tokenizer`; for others labels as texts, as of [`VARPipeline`].
            condition_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
                Images that the model is conditioned on, as for [`~VARPipeline.encode_images`], one image each, for a model
                with a `condition_vqvae`: segmentation maps as pictures of class ids, for instance.
            condition_codes (`torch.LongTensor` of shape `(batch, condition_length)`, *optional*):
                Condition tokens themselves, in place of both.
            codes (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Codes of images to be completed: of whole images, such as `encode_images` returns, with `num_given_rows`, or
                those that an interrupted call returned.
            num_given_rows (`int`, *optional*, defaults to all that `codes` holds):
                Rows of tokens, from the top of the (first) map, that keep the `codes` in place of being sampled.
            height (`int`, *optional*): Height of the images in pixels, `config.image_size` of the `vqvae` or more.
            width (`int`, *optional*):
                Their width. In larger images an [`RQTransformer`] predicts each code in a window of its own size (Esser et
                al. 2021, section 3.3), which is read anew for each position: no cache helps. `condition_image` or
                `condition_codes` are then maps of the whole size.
            guidance_scale (`float` or `Callable`, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Classifier-free guidance of all positions, 1 is off. A callable of the map k and the number of maps K
                gives the weight of each map: a level, a scale, or a depth.
            top_k (`int` or list of them, *optional*):
                Sample from this many most likely codes. `None` means 900, or all of a smaller codebook; 0 means all. A
                list has one value per map, here and below.
            top_p (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Sample from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Divides the guided logits: above 1 for more variety, below 1 for less.
            logits_processor (`LogitsProcessor` or `LogitsProcessorList`, *optional*): As of [`VARPipeline`], for each code.
            class_embeds (`torch.FloatTensor` of shape `(batch, condition_size)`, *optional*):
                Class embeddings in place of `class_labels`, for a [`VARTransformer`].
            num_images_per_label (`int`, *optional*, defaults to 1):
                Images for each label, prompt or condition, next to each other.
            num_images_per_prompt (`int`, *optional*, defaults to 1): The same under diffusers' name.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness, on any device. With a list, one for each image, an image does not depend on the
                others of its batch.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for what `vqvae.decode` takes as `latents`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each row as `callback(pipe, step, k, tensors)` with the number of the row among those that are
                sampled, and its level or scale. It may set `pipe._interrupt`.
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
            `ValueError`: If an argument is out of range, before anything is sampled.
            `TypeError`: If an argument is unknown.
        """
        canvas = make_canvas(self.vqvae, self.prior.config, codes, num_given_rows, height, width)
        given = {"prompt": prompt, "condition_image": condition_image, "condition_codes": condition_codes}
        condition, canvas = self._token_condition(given, class_labels, canvas)
        sizes = {} if canvas.given is None else {"codes": len(canvas.given)}
        call, condition, items = self._prepare(class_labels, {**options, "prompt": prompt}, condition, **sizes)
        if canvas.given is not None:
            canvas = replace(canvas, given=canvas.given[items["codes"]])
        with self._at_work():
            latents, codes = self._draw_best(call, condition, canvas)
            return self._output(call, self._images(latents, call.output_type), codes)

    @torch.no_grad()
    def encode_conditions(self, condition_image: PipelineImageInput) -> torch.Tensor:
        r"""
        Condition tokens of images, for `condition_codes`.

        Args:
            condition_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these): As for a call.

        Returns:
            `torch.LongTensor` of shape `(batch, condition_length)`.

        Raises:
            `ValueError`: If there is no `condition_vqvae`, or these are not images for it.
        """
        if self.condition_vqvae is None:
            raise ValueError("`condition_image` needs a pipeline with a `condition_vqvae`.")
        return self._encoded(self.condition_vqvae, condition_image)

    def _encoded(self, condition_vqvae: Any, condition_image: PipelineImageInput) -> torch.Tensor:
        pixels = image_pixels(condition_image, condition_vqvae.config, "condition_image")
        with self._at_work(self.condition_vqvae) as device:
            return condition_vqvae.encode(pixels.to(device)).codes

    @torch.no_grad()
    def decode_progress(self, codes: torch.Tensor, output_type: str = "pil") -> list:
        r"""
        The images after each level, scale or depth, coarse to fine; the vectors of those after it are zeros.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images, such as a call returns.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list`: For each map the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If `codes` has the wrong shape or `output_type` is not supported.
        """
        check_output(output_type, self.vqvae.config)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt', got 'latent'.")
        codes = checked_codes("codes", codes, self.vqvae.config)
        with self._at_work() as device:
            codes, numbers = codes.to(device), torch.arange(codes.shape[1], device=device)
            ends = accumulate(self.vqvae.config.scale_lengths)
            latents = [known_latents(self.vqvae, codes, numbers < end) for end in ends]
            return [self._images(single, output_type) for single in latents]

    # ----------------------------------------------------------------------------------------------------------------
    # The arguments of a call

    def _prepare(
        self, class_labels: Labels, options: Mapping[str, Any], condition: Condition | None = None, **sizes: int
    ) -> tuple[CallSettings, Condition, dict[str, list[int]]]:
        options = {"callback_on_step_end_tensor_inputs": ["codes"], **options}
        if condition is not None and options.get("class_embeds") is not None:
            raise ValueError(f"Pass one of `class_embeds` and `{condition.name}`, not both.")
        call, condition, items = super()._prepare(class_labels, options, condition, **sizes)
        self.check_sampling(call.sampling)
        self._check_unconditional(1.0, condition)
        return call, condition, items

    def check_sampling(self, settings: SamplingSettings) -> None:
        self._check_unconditional(settings.guidance_scale)

    def _check_unconditional(self, guidance_scale: Guidance, condition: Condition | None = None) -> None:
        """Raise a `ValueError` if a prior is asked for what only class dropout teaches: to do without a condition."""
        last_guided = last_guided_scale(guidance_scale, len(self.vqvae.config.patch_nums))
        for level, config in enumerate(prior.config for prior in self.priors):
            if knows_unconditional(config):
                continue
            if condition is not None and condition.is_lacking(config.num_labels):
                name = f"{condition.name}` must be {'classes' if config.num_labels else 'passed'}"
                raise ValueError(f"`{name}: the prior was trained without class dropout.")
            if level <= last_guided:
                raise ValueError(
                    "`guidance_scale` must be 1 for a prior that was trained without class dropout, got "
                    f"{guidance_scale!r}."
                )

    def _token_condition(
        self, given: Mapping[str, Any], class_labels: Labels, canvas: Canvas
    ) -> tuple[Condition | None, Canvas]:
        """The condition of an [`RQTransformer`] that reads tokens, if it is one, and whether it moves with the window."""
        config = self.prior.config
        reads_tokens = isinstance(config, RQTransformerConfig)
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"Pass one of {' and '.join(f'`{name}`' for name in given)}, not both.")
        if given.keys() <= {"prompt"} and (not reads_tokens or config.has_classes):
            return None, canvas
        name, value = next(iter(given.items()), ("condition_codes", None))
        if not reads_tokens:
            raise ValueError(f"`{name}` needs an `RQTransformer`, got a {type(self.prior).__name__}.")
        labels = self.get_label_ids(class_labels)
        if any(label != (config.num_labels or 0) for label in labels):
            raise ValueError(
                f"`class_labels` must be None {'beside `' + name + '`' if given else 'for a prior without classes'}."
            )
        ids = None if value is None else self._condition_ids(name, value, canvas)
        moves = ids is not None and ids.shape[1] != config.condition_length
        return ids_condition(config, ids, name, len(labels)), replace(canvas, moves_condition=moves)

    def _condition_ids(self, name: str, value: Any, canvas: Canvas) -> torch.Tensor:
        """Condition tokens `(batch, condition_length)`, or those of the whole canvas."""
        config = self.prior.config
        needed = {"prompt": "tokenizer", "condition_image": "condition_vqvae"}.get(name)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"`{name}` needs a pipeline with a `{needed}`.")
        # The size of a condition that is a map and moves with the window.
        moved = canvas.size if config.condition_length == config.num_positions else None
        if name == "prompt":
            return prompt_ids(self.tokenizer, value, config.condition_length)
        if name == "condition_codes":
            lengths = [config.condition_length, *([] if moved is None else [math.prod(moved)])]
            return given_ids(value, lengths, config.num_condition_ids)
        vqvae = self.condition_vqvae
        if moved is not None and vqvae.config.scale_sizes == config.scale_sizes[:1]:
            vqvae = vqvae.at_size(*(side * vqvae.config.downsampling_factor for side in moved))
        return self._encoded(vqvae, value)

    # ----------------------------------------------------------------------------------------------------------------
    # Sampling

    def _length(self, canvas: Canvas) -> int:
        return len(canvas.order.places)

    def _draw(self, call: CallSettings, condition: Condition, canvas: Canvas) -> tuple[Any, torch.Tensor]:
        """Sample codes one after the other: latents, and codes `(batch, length)`."""
        order, num_maps = canvas.order, len(self.vqvae.config.patch_nums)
        predictor = self._predictor(call, condition, canvas)
        sampler = Sampler(call.sampling, call.generator, num_maps)
        device = self._execution_device
        sampled = torch.zeros(len(condition), len(order.places), dtype=torch.long, device=device)
        first = 0
        if canvas.given is not None:
            first = canvas.given.shape[1]
            sampled[:, :first] = canvas.given
        state = CallState(call.sampling.guidance_scale, num_timesteps=sum(end > first for end in order.row_ends))
        end, step = len(order.places), 0
        with self._showing(state), self.progress_bar(total=state.num_timesteps) as progress_bar:  # pyright: ignore
            for number, place in enumerate(order.places[first:], start=first):
                logits = predictor.logits(sampled, number, _weight(state.guidance_scale, place.k, num_maps))
                sampled[:, number : number + 1], _ = sampler.draw(logits, place.k, [sampled[:, :number]])
                if not place.ends_row:
                    continue
                progress_bar.update()
                if call.callback_on_step_end is not None:
                    self._call_back(call, step, place.level, canvas, sampled[:, : number + 1])
                step += 1
                if state.interrupt:
                    end = number + 1
                    break
        return canvas.latents(sampled[:, :end]), order.codes(sampled[:, :end])

    def _predictor(self, call: CallSettings, condition: Condition, canvas: Canvas) -> RasterPredictor:
        """What predicts the codes, by the kind of the prior."""
        config, device = self.prior.config, self._execution_device
        num_scales = len(self.vqvae.config.patch_nums)
        last_guided = -1 if condition.is_unconditional else call.sampling.last_guided_scale(num_scales)
        if not isinstance(config, RQTransformerConfig | VARConfig):
            arguments = [
                condition.arguments(device, guided=k <= last_guided) if prior.config.num_labels else {}
                for k, prior in enumerate(self.priors)
            ]
            return LevelsPredictor(self.priors, canvas.order, arguments)
        guided = last_guided >= 0
        arguments = condition.arguments(device, guided)
        vectors: Any = None
        if isinstance(config, VARConfig) or config.code_inputs == "vectors":
            # Looked up once in a call, since the weights of an offloaded tokenizer move each time.
            vectors = self.vqvae.code_vectors(torch.arange(config.codebook_size, device=device))
        if isinstance(config, VARConfig):
            return TokenPredictor(self.prior, vectors, arguments, guided)
        if canvas.size is None:
            return StackPredictor(self.prior, vectors, arguments, guided)
        return WindowPredictor(self.prior, vectors, arguments, guided, canvas.size, canvas.moves_condition)

    def _call_back(self, call: CallSettings, step: int, k: int, canvas: Canvas, sampled: torch.Tensor) -> None:
        make = {
            "codes": lambda: canvas.order.codes(sampled),
            "images": lambda: self._images(canvas.latents(sampled), "pt"),
        }
        tensors = {name: make[name]() for name in call.callback_on_step_end_tensor_inputs}
        call.callback_on_step_end(self, step, k, tensors)  # pyright: ignore

    def _decode(self, latents: Any) -> torch.Tensor:
        vqvae, config = self.vqvae, self.vqvae.config
        if isinstance(latents, torch.Tensor) and latents.shape[2:] != config.latent_size:
            vqvae = vqvae.at_size(*(side * config.downsampling_factor for side in latents.shape[2:]))
        return vqvae.decode(latents=latents).sample

    def _scored_condition(self, class_labels: Labels, given: Mapping[str, Any]) -> Condition:
        of_tokens = {name: value for name, value in given.items() if name != "class_embeds"}
        condition, _ = self._token_condition(of_tokens, class_labels, make_canvas(self.vqvae, self.prior.config))
        if condition is None:
            condition = super()._scored_condition(class_labels, given)
        self._check_unconditional(1.0, condition)
        return condition

    def _scorer(self, codes: torch.Tensor) -> TokenScorer:
        config = self.prior.config
        if isinstance(config, VARConfig):
            inputs = self.vqvae.teacher_forcing(codes, is_raster=True)
            return lambda images, condition: token_log_probs(self.prior, codes[images], inputs[images], **condition)
        if isinstance(config, RQTransformerConfig):
            vectors = self.vqvae.code_vectors(codes) if config.code_inputs == "vectors" else None
            return lambda images, condition: stack_log_probs(
                self.prior, codes[images], None if vectors is None else vectors[images], **condition
            )
        levels = codes.split(self.vqvae.config.scale_lengths, dim=1)
        return lambda images, condition: level_log_probs(self.priors, [level[images] for level in levels], condition)


def _weight(guidance_scale: Guidance, k: int, num_maps: int) -> float:
    return guidance_scale(k, num_maps) if callable(guidance_scale) else guidance_scale
