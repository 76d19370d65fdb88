# SPDX-License-Identifier: Apache-2.0
"""The base of all pipelines: models, labels, encoding and decoding, speed and offloading."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import nn

from ..autoencoders import VQVAEModel
from ..modes import evaluation_mode
from ..precision import ONEDNN_MATMUL, fp32_precision
from ..priors import VARTransformer
from .checks import (
    check_components,
    check_flag,
    check_guidance,
    check_output,
    check_temperature,
    check_top_p,
    checked_codes,
)
from .compilation import CompiledModels, FrozenModels, compile_models, unwrapped
from .conditions import Labels, label_ids
from .editing import interpolated_latents, mixed_latents
from .images import image_pixels, make_processor
from .lora import LoraMixin
from .options import CHECKPOINT_DEFAULTS
from .sampling import Guidance


@dataclass
class CallState:
    """State of a running call that callbacks see and may change: the pipeline's `guidance_scale`, for example."""

    guidance_scale: Guidance
    num_timesteps: int = 0
    interrupt: bool = False


# The state of the running call in this thread or task, by the pipeline's id: one pipeline may serve several threads, and
# a callback may call another one.
_STATES: ContextVar[Mapping[int, CallState]] = ContextVar("states", default={})  # noqa: B039 - never changed in place


class VARPipelineBase(LoraMixin):
    """Models and methods of [`VARPipeline`], which describes the arguments."""

    # The tokenizer is small and runs between the scales. It is outside the chain, so it is loaded once per call.
    model_cpu_offload_seq = "transformer"

    _compiled: CompiledModels | FrozenModels | None = None
    _prefers_onednn = False

    def __init__(
        self,
        transformer: VARTransformer,
        vqvae: VQVAEModel,
        guidance_scale: float = CHECKPOINT_DEFAULTS["guidance_scale"],
        top_p: float = CHECKPOINT_DEFAULTS["top_p"],
        temperature: float = CHECKPOINT_DEFAULTS["temperature"],
    ):
        super().__init__()
        check_components(transformer, vqvae)
        if callable(guidance_scale):
            raise ValueError("`guidance_scale` of a pipeline must be a number, which its configuration can hold.")
        check_guidance(guidance_scale)
        check_top_p(top_p)
        check_temperature(temperature)
        self.register_modules(transformer=transformer, vqvae=vqvae)
        # NumPy floats are not JSON-serializable.
        self.register_to_config(
            guidance_scale=float(guidance_scale), top_p=float(top_p), temperature=float(temperature)
        )
        self._last_state = CallState(guidance_scale)
        self.image_processor = make_processor(vqvae.config)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs) -> Any:
        r"""
        A pipeline of this class with the models and the defaults of another one, see diffusers'
        `DiffusionPipeline.from_pipe`. The models keep their precision, which is the other pipeline's, too.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(f"`pipeline` must be a pipeline, got {type(pipeline).__name__}.")
        if kwargs.keys() & {"dtype", "torch_dtype", "custom_pipeline"}:
            return super().from_pipe(pipeline, **kwargs)
        # diffusers' method would turn the models to fp32, for both pipelines.
        shared = {**pipeline.config, **pipeline.components}
        accepted = inspect.signature(cls.__init__).parameters
        made = cls(**{**{name: value for name, value in shared.items() if name in accepted}, **kwargs})
        if pipeline.config.get("_name_or_path") is not None:
            made.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return made

    @property
    def _state(self) -> CallState:
        """The state of this thread's call; outside of a call, of the call that began last."""
        return _STATES.get().get(id(self), self._last_state)

    guidance_scale = property(
        lambda self: self._state.guidance_scale,
        doc="The current guidance scale. A callback may change it between the scales by setting `pipe._guidance_scale`, "
        "unless the call began at 1, where no unconditional logits are computed.",
    )
    num_timesteps = property(
        lambda self: self._state.num_timesteps, doc="Number of steps of the call: the scales that it samples."
    )
    interrupt = property(
        lambda self: self._state.interrupt,
        doc="Whether the remaining scales are left out; a callback sets `pipe._interrupt`.",
    )
    # As callbacks write them.
    _guidance_scale = property(guidance_scale.fget, lambda self, value: setattr(self._state, "guidance_scale", value))
    _interrupt = property(interrupt.fget, lambda self, value: setattr(self._state, "interrupt", value))

    @contextmanager
    def _showing(self, state: CallState) -> Iterator[None]:
        """Show this thread's callbacks the state of its own call."""
        self._last_state = state
        token = _STATES.set({**_STATES.get(), id(self): state})
        try:
            yield
        finally:
            _STATES.reset(token)

    # ----------------------------------------------------------------------------------------------------------------
    # Labels and images

    def get_label_ids(self, labels: Labels) -> list[int]:
        r"""
        Ids of class labels.

        Args:
            labels (`int`, `str`, `None`, `torch.Tensor` or a list of these):
                Ids, names of `transformer.config.id2label` or their comma-separated synonyms; `None` and -1 are
                unconditional. Where names are numbers, a text may be the name of one label and the id of another:
                `"name:7"` and `"id:7"` choose.

        Returns:
            `list[int]`, where the number of labels means unconditional.

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
            `torch.FloatTensor` of shape `(batch, condition_size)`.

        Raises:
            `ValueError`: If a label is out of range, unknown or ambiguous, or the weights are offloaded.
        """
        return self.transformer.get_class_embeds(torch.tensor(self.get_label_ids(labels)))

    @torch.no_grad()
    def encode_images(self, image: PipelineImageInput) -> torch.Tensor:
        r"""
        Codes of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                PIL images; arrays `(height, width, channels)` or `(batch, height, width, channels)` or tensors
                `(channels, height, width)` or `(batch, channels, height, width)` with values in [0, 1]. Images of
                another size are resized to the tokenizer's, whatever their aspect: PIL images with Lanczos' filter, arrays
                and tensors with nearest neighbours.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`.

        Raises:
            `ValueError`: If these are not images, or have other channels than the tokenizer.
        """
        pixels = image_pixels(image, self.vqvae.config)
        with self._at_work():
            return self._encode(pixels)

    @torch.no_grad()
    def decode_progress(self, codes: torch.Tensor, output_type: str = "pil") -> list:
        r"""
        The images after each scale, coarse to fine.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images, such as a call returns.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"`.

        Returns:
            `list`: For each scale the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If `codes` has the wrong shape or `output_type` is not supported.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        if output_type == "latent":
            raise ValueError("`output_type` must be 'pil', 'np' or 'pt', got 'latent'.")
        codes = checked_codes("codes", codes, self.vqvae.config)
        numbers = range(1, len(self.vqvae.config.patch_nums) + 1)
        with self._at_work() as device:
            codes = codes.to(device)
            samples = [self.vqvae.decode(codes, num_scales=number).sample for number in numbers]
        return [self.image_processor.postprocess(sample, output_type=output_type) for sample in samples]

    @torch.no_grad()
    def interpolate(
        self,
        codes: torch.Tensor,
        other_codes: torch.Tensor,
        weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        output_type: str = "pil",
    ) -> list:
        r"""
        The way from one image to another on the line between their latents.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`):
                Codes of whole images, such as a call or [`~VARPipeline.encode_images`] returns.
            other_codes (`torch.LongTensor` of shape `(batch, length)`): As many others.
            weights (`list[float]`, *optional*, defaults to `(0.0, 0.25, 0.5, 0.75, 1.0)`):
                Share of the others: 0 gives the images of `codes`, 1 those of `other_codes`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            `list`: For each weight the images of the batch, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If the codes are not those of whole images or of equally many, or a weight is not a number.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        with self._at_work() as device:
            latents = interpolated_latents(self.vqvae, codes, other_codes, weights, device)
            return [self._images(between, output_type) for between in latents]

    @torch.no_grad()
    def mix_scales(
        self, codes: torch.Tensor, other_codes: torch.Tensor, num_scales: int, output_type: str = "pil"
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        r"""
        The coarse scales of one image with the fine scales of another.

        Args:
            codes (`torch.LongTensor` of shape `(batch, length)`): Codes of whole images.
            other_codes (`torch.LongTensor` of shape `(batch, length)`): As many others.
            num_scales (`int`): Number of scales, from the first, that are those of `codes`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            The images, in the form of `VARPipelineOutput.images`.

        Raises:
            `ValueError`: If the codes are not those of whole images or of equally many, or `num_scales` is out of range.
        """
        check_output(output_type, self.vqvae.config.num_output_channels)
        with self._at_work() as device:
            latents = mixed_latents(self.vqvae, codes, other_codes, num_scales, device)
            return self._images(latents, output_type)

    # ----------------------------------------------------------------------------------------------------------------
    # Speed and memory

    def compile(self, mode: str | None = None, freezing: bool | None = None, **kwargs) -> None:
        r"""
        Compile the models: on a CPU the transformer, with its weights as constants; otherwise the transformer, a graph for
        each scale, and the decoder. Codes and images are those of the uncompiled pipeline up to rounding.

        **With `freezing`**, the first call compiles, which takes a minute for a large model, and one graph serves all
        scales but the first, and all batch sizes. A single image without guidance needs another one, and so do calls in
        inference mode and under autocast. Each graph holds a copy of the weights until the process ends. oneDNN computes
        the products of fp32 matrices if torch was built with MKL. The decoder is not compiled: it gains little or gets
        slower. If the weights have changed since the first call or are offloaded, or if the transformer has hooks, it
        runs uncompiled and a warning says so.

        **Without**, the first call of a batch size compiles, for a large model some minutes; further ones compile nothing.
        It is meant for CUDA, where a small batch waits for its kernels to be launched. A cache of keys and values stays
        allocated between calls, for the batch size of the last one. At most eight batch sizes are compiled (guided and
        unguided calls, and scales of adapters, count separately); others run uncompiled. So does a call while another one
        is running, in another thread or around it. Weights may be trained or adapted later.

        Where several scales are read at once (by [`VARImg2ImgPipeline`] and by a `refiner`), and in a `refiner`, the model
        runs uncompiled. The pipeline's models are not changed. Pipelines made by `from_pipe` must be compiled separately.
        After exchanging a model or moving it to another kind of device, call this method again.

        Args:
            mode (`str`, *optional*):
                That of `torch.compile`. The default is `"reduce-overhead"` on CUDA, which replays CUDA graphs, unless
                `backend` or `options` are given.
            freezing (`bool`, *optional*):
                Whether the weights become constants. The default is to do so where they can, that is on a CPU and if
                they are neither offloaded nor quantized, and no `backend` is given.
            kwargs:
                Further arguments of `torch.compile`: `backend`, `options`, `fullgraph`.

        Raises:
            `ValueError`: If `freezing=True` and the weights cannot be constants, or `freezing` is no truth value.
        """
        if freezing is not None:
            check_flag("freezing", freezing)
        on_cuda = self._execution_device.type == "cuda"
        self._compiled = compile_models(self.transformer, self.vqvae, freezing, on_cuda, mode=mode, **kwargs)

    def enable_onednn_matmul(self) -> None:
        r"""
        Let oneDNN multiply the fp32 matrices of a CPU during calls, in place of MKL, which is slow on other CPUs than
        Intel's.

        It sets `torch.backends.mkldnn.matmul.fp32_precision` to `"bf16"` for the time of a call, and then back. The name
        says what else it permits: where the CPU has bf16 matrix units (AMX), oneDNN may round to bf16, and codes may be
        others. Elsewhere it computes in fp32. The setting belongs to the process: if several threads sample, set it
        once for all of them instead.
        """
        self._prefers_onednn = True

    def disable_onednn_matmul(self) -> None:
        """Leave the choice of the library to torch again, see [`~VARPipeline.enable_onednn_matmul`]."""
        self._prefers_onednn = False

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs) -> None:
        r"""
        Offload groups of the transformer's layers, see diffusers' `DiffusionPipeline.enable_group_offload`. The vqvae
        stays on the device: it is small, and it works between the scales.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
        super().enable_group_offload(*args, exclude_modules=[*excluded, "vqvae"], **kwargs)

    # ----------------------------------------------------------------------------------------------------------------
    # Parts of all methods

    @contextmanager
    def _at_work(self, *others: nn.Module | None) -> Iterator[torch.device]:
        """The models, and others, in evaluation mode; afterwards those that are offloaded leave the device."""
        precision = fp32_precision(ONEDNN_MATMUL if self._prefers_onednn else {})
        with evaluation_mode(self.transformer, self.vqvae, *others), precision:
            yield self._execution_device
        self.maybe_free_model_hooks()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vqvae.encode(pixels.to(self._execution_device)).codes

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]."""
        compiled, decode = self._compiled, self.vqvae.decode
        if compiled is not None and compiled.vqvae is unwrapped(self.vqvae):
            decode = compiled.decode
        return decode(latents=latents).sample

    def _images(self, latents: torch.Tensor, output_type: str) -> Any:
        """Latents as images in the form that was asked for."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decode(latents), output_type=output_type)
