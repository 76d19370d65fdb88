# SPDX-License-Identifier: Apache-2.0
"""The base of the pipelines of a VAR transformer: edits of codes, compilation and offloading."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from ..priors.modeling_blocks import BlockTransformer
from .base import PipelineBase
from .checks import check_flag, check_output, checked_codes
from .compilation import CompiledModels, FrozenModels, compile_models, unwrapped
from .editing import interpolated_latents, mixed_latents
from .lora import LoraMixin


class VARPipelineBase(LoraMixin, PipelineBase):
    """Models and methods of [`VARPipeline`], which describes the arguments."""

    # The tokenizer is small and runs between the scales. It is outside the chain, so it is loaded once per call.
    model_cpu_offload_seq = "transformer"
    # A narrower model loses more by the calls of oneDNN than it gains, for a single image of few tokens.
    _onednn_width = 256

    _compiled: CompiledModels | FrozenModels | None = None

    @property
    def priors(self) -> list[BlockTransformer]:
        return [self.transformer]

    # ----------------------------------------------------------------------------------------------------------------
    # Images

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
        check_output(output_type, self.vqvae.config)
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
        check_output(output_type, self.vqvae.config)
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
        check_output(output_type, self.vqvae.config)
        with self._at_work() as device:
            latents = mixed_latents(self.vqvae, codes, other_codes, num_scales, device)
            return self._images(latents, output_type)

    # ----------------------------------------------------------------------------------------------------------------
    # Speed and memory

    def compile(self, mode: str | None = None, freezing: bool | None = None, **kwargs) -> None:
        r"""
        Compile the models: on a CPU the transformer, with its weights as constants; otherwise the transformer, a graph for
        each scale, and the decoder. Codes and images are those of the uncompiled pipeline up to rounding.

        **With freezing**, the first call compiles, which takes a minute for a large model, and one graph serves all
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

        Where several scales are read at once (by [`VARImg2ImgPipeline`] and by a `refiner`), in a `refiner` and with
        `layer_hooks`, the model runs uncompiled. The pipeline's models are not changed. Pipelines made by `from_pipe`
        must be compiled separately. After exchanging a model or moving it to another kind of device, call this method
        again.

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

    def enable_group_offload(self, *args, exclude_modules: str | list[str] | None = None, **kwargs) -> None:
        r"""
        Offload groups of the transformer's layers, see diffusers' `DiffusionPipeline.enable_group_offload`. The vqvae
        stays on the device: it is small, and it works between the scales.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or [])
        super().enable_group_offload(*args, exclude_modules=[*excluded, "vqvae"], **kwargs)

    # ----------------------------------------------------------------------------------------------------------------
    # Parts of all methods

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1], or logits of class maps."""
        compiled = self._compiled
        if compiled is not None and compiled.vqvae is unwrapped(self.vqvae):
            return compiled.decode(latents=latents).sample
        return super()._decode(latents)
