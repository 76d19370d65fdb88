# SPDX-License-Identifier: Apache-2.0
"""Images from class labels."""

import functools
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor

from ..autoencoders import VQVAEConfig, VQVAEModel
from ..priors import VARCache, VARConfig, VARTransformer
from .adapters import LoraMixin, is_adapter_module
from .labels import Labels, label_ids
from .pipeline_output import VARPipelineOutput
from .sampling import Generators, apply_guidance, draw_codes, filter_logits, guidance_weight, smooth_weights


# The official default, unless the codebook is smaller.
DEFAULT_TOP_K = 900


def _in_evaluation_mode(call: Callable) -> Callable:
    """Draw without dropout from models that are being trained, and give every module its mode back."""

    @functools.wraps(call)
    def wrapper(pipeline: "VARPipeline", *args, **kwargs):
        models = (pipeline.transformer, pipeline.vqvae)
        training = [module for model in models for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return call(pipeline, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return wrapper


class VARPipeline(LoraMixin):
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

    # The tokenizer is small and works between the scales: outside the chain it is loaded once per call.
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: VARTransformer,
        vqvae: VQVAEModel,
        guidance_scale: float = 2.5,
        top_p: float = 0.96,
        temperature: float = 1.0,
    ):
        super().__init__()
        _check_components(transformer, vqvae)
        _check_sampling(guidance_scale, top_p, temperature)
        self.register_modules(transformer=transformer, vqvae=vqvae)
        # As Python's floats: numpy's are no JSON.
        self.register_to_config(
            guidance_scale=float(guidance_scale), top_p=float(top_p), temperature=float(temperature)
        )
        self._guidance_scale = guidance_scale
        self.image_processor = VaeImageProcessor(vae_scale_factor=vqvae.config.downsampling_factor)

    @property
    def guidance_scale(self) -> float:
        """
        The current guidance scale. A callback may change it between the scales by setting `pipe._guidance_scale`,
        unless the call began at 1, where no unconditional logits are computed.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call: the scales."""
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

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs) -> None:
        r"""
        Offload groups of the transformer's layers, see diffusers' `DiffusionPipeline.enable_group_offload`. The vqvae
        stays on the device: it is small, and it works between the scales.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
        super().enable_group_offload(*args, exclude_modules=[*excluded, "vqvae"], **kwargs)

    @torch.no_grad()
    @_in_evaluation_mode
    def __call__(
        self,
        class_labels: Labels = None,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
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
    ) -> VARPipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
                Ids or names, one image each; `None` and -1 are unconditional.
            guidance_scale (`float`, *optional*, defaults to the checkpoint's, 2.5 if it has none):
                Classifier-free guidance at the last scale, 1 is off; it grows linearly from 1 at the first scale. The
                official code's `cfg` is `guidance_scale - 1`, so that its `cfg=1.5` is 2.5 here.
            top_k (`int`, *optional*):
                Draw from this many most likely codes. `None` means 900, or all of a smaller codebook; 0 means all.
            top_p (`float`, *optional*, defaults to the checkpoint's, 0.96 if it has none):
                Draw from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float`, *optional*, defaults to the checkpoint's, 1.0 if it has none):
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
                Tensors that the callback gets.

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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        ids = self.get_label_ids(class_labels)
        guidance_scale = float(self.config["guidance_scale"]) if guidance_scale is None else guidance_scale
        top_p = float(self.config["top_p"]) if top_p is None else top_p
        temperature = float(self.config["temperature"]) if temperature is None else temperature
        top_k = self._check_inputs(
            guidance_scale,
            top_k,
            top_p,
            temperature,
            num_images_per_label,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        ids = [label for label in ids for _ in range(num_images_per_label)]
        batch_size = len(ids)
        _check_generator(generator, batch_size)

        config = self.transformer.config
        num_scales = len(config.patch_nums)
        self._guidance_scale = guidance_scale
        self._num_timesteps = num_scales
        self._interrupt = False
        unconditional = config.num_labels
        guided = guidance_scale != 1 and any(label != unconditional for label in ids)
        labels = torch.tensor(ids + [unconditional] * batch_size if guided else ids, device=self._execution_device)

        cache = VARCache(config)
        latents, scale_inputs, codes = None, None, []
        with self.progress_bar(total=num_scales) as progress_bar:  # pyright: ignore[reportCallIssue]
            for k in range(num_scales):
                if self.interrupt:
                    break
                # The cache knows the class after the first scale.
                logits = self.transformer(
                    class_labels=labels if k == 0 else None, scale_inputs=scale_inputs, past_key_values=cache
                ).logits
                if guided:
                    logits = apply_guidance(logits, guidance_weight(self.guidance_scale, k, num_scales))
                logits = filter_logits(
                    logits / temperature, top_k, top_p
                )  # (batch, length of the scale, codebook_size)
                codes.append(draw_codes(logits, generator))
                if smooth:
                    weights = smooth_weights(logits, k, num_scales, generator)
                    latents, scale_inputs = self.vqvae.next_scale(latents, self.vqvae.mix_code_vectors(weights), k)
                else:
                    latents, scale_inputs = self.vqvae.next_scale(latents, codes[-1], k)
                if callback_on_step_end is not None:
                    available = {"latents": latents}
                    requested = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, k, k, requested) or {}
                    latents = returned.pop("latents", latents)
                    scale_inputs = self.vqvae.scale_inputs(latents, k + 1) if k + 1 < num_scales else None
                if guided and scale_inputs is not None:
                    scale_inputs = scale_inputs.repeat(2, 1, 1)
                progress_bar.update()

        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(
                self.vqvae.decode(latents=latents).sample, output_type=output_type
            )
        self.maybe_free_model_hooks()

        codes = torch.cat(codes, dim=1)
        return VARPipelineOutput(images=images, codes=codes) if return_dict else (images, codes)

    def _check_inputs(
        self,
        guidance_scale: float,
        top_k: int | None,
        top_p: float,
        temperature: float,
        num_images_per_label: int,
        output_type: str,
        callback_tensor_inputs: list[str],
    ) -> int:
        """Check the arguments and resolve `top_k`."""
        codebook_size = self.transformer.config.codebook_size
        _check_sampling(guidance_scale, top_p, temperature)
        if top_k is None:
            top_k = min(DEFAULT_TOP_K, codebook_size)
        elif not _is_number(top_k, Integral) or not 0 <= top_k <= codebook_size:
            raise ValueError(
                f"`top_k` must be from 1 to codebook_size={codebook_size}, 0 for all codes or `None` for the default, "
                f"got {top_k!r}."
            )
        if not _is_number(num_images_per_label, Integral) or num_images_per_label < 1:
            raise ValueError(f"`num_images_per_label` must be an integer of at least 1, got {num_images_per_label!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        channels = self.vqvae.config.num_output_channels
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(
                f"`output_type` must be 'np', 'pt' or 'latent' for images of {channels} channels, got 'pil'."
            )
        unknown = [name for name in callback_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        return top_k


def _is_number(value: Any, kind: type[Real] = Real) -> bool:
    # numpy's numbers count as Python's.
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _check_sampling(guidance_scale: float, top_p: float, temperature: float) -> None:
    if not _is_number(guidance_scale):
        raise ValueError(f"`guidance_scale` must be a finite number, 1 for no guidance, got {guidance_scale!r}.")
    if not _is_number(top_p) or not 0 <= top_p <= 1:
        raise ValueError(f"`top_p` must be in [0, 1], where 0 and 1 mean all codes, got {top_p!r}.")
    if not _is_number(temperature) or temperature <= 0:
        raise ValueError(f"`temperature` must be a number above 0, got {temperature!r}; greedy choice is `top_k=1`.")


def _check_generator(generator: Generators, batch_size: int) -> None:
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"`generator` must be one generator or {batch_size}, one per image, got {len(generator)}.")
    for single in generator if isinstance(generator, list) else [generator]:
        if not isinstance(single, torch.Generator) and (single is not None or isinstance(generator, list)):
            raise ValueError(
                "`generator` must be a `torch.Generator`, such as `torch.Generator().manual_seed(0)`, or a list of "
                f"them, got {single!r}."
            )


def _check_components(transformer: VARTransformer, vqvae: VQVAEModel) -> None:
    for name, component, config_class in (("transformer", transformer, VARConfig), ("vqvae", vqvae, VQVAEConfig)):
        # By its configuration: the model itself may be wrapped, by torch.compile for one.
        if not isinstance(getattr(component, "config", None), config_class):
            raise ValueError(
                f"`{name}` must be a model with a {config_class.__name__}, got {type(component).__name__}."
            )
        if is_adapter_module(component):
            raise ValueError(
                f"`{name}` must be the model itself, got PEFT's {type(component).__name__} around it: pass its "
                "`get_base_model()`, which has the adapters in its layers, or its `merge_and_unload()`."
            )
    for field in ("codebook_size", "latent_channels", "patch_nums"):
        ours, theirs = getattr(transformer.config, field), getattr(vqvae.config, field)
        if ours != theirs:
            raise ValueError(
                f"`transformer` and `vqvae` do not belong together: {field} is {ours} in the transformer and {theirs} in "
                "the vqvae."
            )
    if transformer.config.block_lengths != transformer.config.scale_lengths:
        raise ValueError(
            "`transformer` must predict a whole scale at a time, got block_sizes="
            f"{transformer.config.block_sizes} for patch_nums={transformer.config.patch_nums}."
        )
