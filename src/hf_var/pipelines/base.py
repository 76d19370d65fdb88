# SPDX-License-Identifier: Apache-2.0
"""What all pipelines share: the state of a call, labels, images in and out, and the choice of the best sample."""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import nn

from ..code_files import check_has_code, is_ours, is_single_file, write_code_files
from ..modes import evaluation_mode
from ..precision import ONEDNN_MATMUL, fp32_precision, is_onednn_exact
from .checks import as_tensor, check_flag, check_guidance, check_output, check_temperature, check_top_p
from .compilation import unwrapped
from .conditions import Condition, Labels, class_condition, label_ids
from .editing import match_condition
from .images import image_pixels, make_processor
from .options import CallOptions, CallSettings, Scores, resolve_call
from .pipeline_output import VARPipelineOutput
from .sampling import Guidance, SamplingSettings


# Log-probabilities `(pairs, length)` in nats, in fp32, from indices of images `(pairs,)` and the condition of each pair.
TokenScorer = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
# The checked arguments of a call, the condition of each image, and its items of the other inputs.
Prepared = tuple[CallSettings, Condition, dict[str, list[int]]]


@dataclass
class CallState:
    """State of a running call that callbacks see and may change: the pipeline's `guidance_scale`, for example."""

    guidance_scale: Guidance
    num_timesteps: int = 0
    interrupt: bool = False


# The state of the running call in this thread or task, by the pipeline's id: one pipeline may serve several threads, and
# a callback may call another one.
_STATES: ContextVar[Mapping[int, CallState]] = ContextVar("states", default={})  # noqa: B039 - never changed in place
# Whether what this thread uploads has code: diffusers hands `push_to_hub` no arguments of ours on.
_WITH_CODE: ContextVar[bool] = ContextVar("with_code", default=False)


def load_pipeline(name: str | PathLike, **options: Any) -> "PipelineBase":
    """
    The pipeline in a folder or repository, of the class that its `model_index.json` names; `options` are those of diffusers'
    `from_pretrained`. A `ValueError` if the class is not one of ours.
    """
    index: Any = PipelineBase.load_config(name, revision=options.get("revision"))
    kind = index.get("_class_name")
    pipeline_class = getattr(diffusers, str(kind), None)
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, PipelineBase)):
        raise ValueError(f"`model` = {str(name)!r} must be a pipeline of hf_var, got a {kind}.")
    return pipeline_class.from_pretrained(name, **options)


class PipelineBase(DiffusionPipeline):
    """State, labels and images of a pipeline with a tokenizer `vqvae` and the models that predict its codes."""

    # Names of the options of its call.
    call_options: Collection[str] = CallOptions.__optional_keys__
    # What images can be scored under, beside class labels.
    scored_conditions: Collection[str] = ("class_embeds", "prompt")
    # What a callback may ask for.
    _callback_tensor_inputs: list[str]
    # `None`: where it rounds nothing, for priors of this width at least.
    _prefers_onednn: bool | None = None
    _onednn_width: float = math.inf

    def _set_defaults(self, guidance_scale: float, top_p: float, temperature: float) -> None:
        """Keep the values that these arguments of a call have by default, which travel with the checkpoint."""
        if callable(guidance_scale):
            raise ValueError("`guidance_scale` of a pipeline must be a number, which its configuration can hold.")
        check_guidance(guidance_scale)
        check_top_p(top_p)
        check_temperature(temperature)
        # NumPy floats are not JSON-serializable.
        self.register_to_config(
            guidance_scale=float(guidance_scale), top_p=float(top_p), temperature=float(temperature)
        )
        self._last_state = CallState(guidance_scale)
        self.image_processor = make_processor(self.vqvae.config)

    @property
    def priors(self) -> Sequence[Any]:
        """The models that predict the codes; the first one has the labels."""
        raise NotImplementedError

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes, by their ids; empty where there are none."""
        return self.priors[0].config.id2label or {}

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
        arguments = {**{name: value for name, value in shared.items() if name in accepted}, **kwargs}
        needed = [name for name, entry in accepted.items() if entry.default is entry.empty and name != "self"]
        missing = [name for name in needed if name not in arguments]
        if missing:
            raise ValueError(
                f"`pipeline` must have {', '.join(missing)} for a {cls.__name__}, got a {type(pipeline).__name__}."
            )
        made = cls(**arguments)
        if pipeline.config.get("_name_or_path") is not None:
            made.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        return made

    def save_pretrained(
        self, save_directory: str | PathLike, *args: Any, with_code: bool = False, **kwargs: Any
    ) -> None:
        """
        Save the pipeline, see diffusers' `DiffusionPipeline.save_pretrained`.

        Args:
            with_code (`bool`, *optional*, defaults to `False`):
                Whether to add the code of the pipeline, for those who load the folder without hf_var, by
                `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)`.

        Raises:
            `ValueError`: If the class of the pipeline, with its code, is not one of hf_var.
        """
        check_flag("with_code", with_code)
        if with_code or _WITH_CODE.get() or is_single_file():
            # Before the weights, since the folder may be uploaded behind them.
            models = {name: unwrapped(component) for name, component in self.components.items()}
            write_code_files(save_directory, type(self), models)
            ours = {name: type(model).__name__ for name, model in models.items() if is_ours(type(model))}
            self.register_to_config(**{name: ("hf_var", kind) for name, kind in ours.items()})
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, with_code: bool = False, **kwargs: Any) -> str:
        """
        Upload the pipeline, see diffusers' `DiffusionPipeline.push_to_hub`.

        Args:
            with_code (`bool`, *optional*, defaults to `False`):
                Whether to add the code of the pipeline, as of [`~VARPipeline.save_pretrained`].

        Raises:
            `ValueError`: If the class of the pipeline, with its code, is not one of hf_var.
        """
        check_flag("with_code", with_code)
        if with_code:
            check_has_code(type(self))
        token = _WITH_CODE.set(with_code)
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            _WITH_CODE.reset(token)

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
                Ids, names of `id2label` or their comma-separated synonyms; `None` and -1 are
                unconditional. Where names are numbers, a text may be the name of one label and the id of another:
                `"name:7"` and `"id:7"` choose.

        Returns:
            `list[int]`, where the number of labels means unconditional.

        Raises:
            `ValueError`: If a label is out of range, unknown (the message suggests near names) or ambiguous.
        """
        return label_ids(labels, self.id2label)

    @torch.no_grad()
    def encode_images(self, image: PipelineImageInput) -> torch.Tensor:
        r"""
        Codes of images.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
                PIL images; arrays `(height, width, channels)` or `(batch, height, width, channels)` or tensors
                `(channels, height, width)` or `(batch, channels, height, width)` with values in [0, 1]. Images of
                another size are resized to the tokenizer's, whatever their aspect: PIL images with Lanczos' filter,
                arrays and tensors with nearest neighbours. For a tokenizer of class maps (`VQVAEConfig.sample_type`),
                pictures in gray or with a palette, or integers `(height, width)` or `(batch, height, width)`, whose
                values are ids of classes; all are resized with nearest neighbours.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`.

        Raises:
            `ValueError`: If these are not images, or have other channels than the tokenizer.
        """
        pixels = image_pixels(image, self.vqvae.config)
        with self._at_work():
            return self._encode(pixels)

    # ----------------------------------------------------------------------------------------------------------------
    # Speed

    def enable_onednn_matmul(self) -> None:
        r"""
        Let oneDNN multiply the fp32 matrices of a CPU during calls, in place of MKL, which is slow on other CPUs than
        Intel's.

        Where oneDNN rounds nothing (x86 processors without bf16 matrix units, AMX) and wide models that predict many codes
        at once gain from it, this is so without being asked for. Elsewhere it sets
        `torch.backends.mkldnn.matmul.fp32_precision` to `"bf16"` for the time of a call all the same: with AMX, oneDNN may
        round to bf16, and codes may be others. The setting belongs to the process, hence to all threads until the last of
        their calls ends.
        """
        self._prefers_onednn = True

    def disable_onednn_matmul(self) -> None:
        """Leave the choice of the library to torch, see [`~VARPipeline.enable_onednn_matmul`]."""
        self._prefers_onednn = False

    @property
    def _uses_onednn(self) -> bool:
        if self._prefers_onednn is not None:
            return self._prefers_onednn
        is_wide = max(prior.config.hidden_size for prior in self.priors) >= self._onednn_width
        return is_wide and self._execution_device.type == "cpu" and is_onednn_exact()

    # ----------------------------------------------------------------------------------------------------------------
    # Parts of all methods

    @contextmanager
    def _at_work(self, *others: nn.Module | None) -> Iterator[torch.device]:
        """The models, and others, in evaluation mode; afterwards those that are offloaded leave the device."""
        precision = fp32_precision(ONEDNN_MATMUL if self._uses_onednn else {})
        with evaluation_mode(*self.priors, self.vqvae, *others), precision:
            yield self._execution_device
        self.maybe_free_model_hooks()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vqvae.encode(pixels.to(self._execution_device)).codes

    def _prepare(
        self,
        class_labels: Labels,
        options: Mapping[str, Any],
        condition: Condition | Callable[[CallSettings], Condition] | None = None,
        **sizes: int,
    ) -> Prepared:
        """
        The shared arguments of a call, the condition of each image (that of `class_labels` unless it is given, or made
        once these arguments are known), and for each image the items of the other inputs, of which there are as many
        as `sizes` says.
        """
        options = dict(options)
        prompt = options.pop("prompt", None)
        call = resolve_call(self.call_options, self.vqvae.config, self.config, options)
        unknown = [
            name for name in call.callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        check_output(call.output_type, self.vqvae.config)
        if condition is None:
            condition = class_condition(self.priors[0], class_labels, call.class_embeds, prompt)
        elif not isinstance(condition, Condition):
            condition = condition(call)
        return call, *match_condition(condition, call.num_images, call.generator, **sizes)

    def check_sampling(self, settings: SamplingSettings) -> None:
        """Raise a `ValueError` if the models cannot sample with these settings."""

    def _draw(self, call: CallSettings, condition: Condition, *given: Any) -> tuple[Any, torch.Tensor]:
        """Sample images: latents, and codes `(batch, length)`."""
        raise NotImplementedError

    def _length(self, *given: Any) -> int:
        """Codes of a whole image of a call."""
        return sum(self.vqvae.config.scale_lengths)

    def _draw_best(self, call: CallSettings, condition: Condition, *given: Any) -> tuple[Any, torch.Tensor]:
        """A sample of each image: of `num_candidates` the one with the highest score."""
        length = self._length(*given)
        best = self._draw(call, condition, *given)
        # A callback may interrupt a call, of which the codes so far are the result.
        if call.score_fn is None or best[1].shape[1] < length:
            return best
        best_scores = self._score(call.score_fn, condition, best[0])
        for _ in range(call.num_candidates - 1):
            drawn = self._draw(call, condition, *given)
            if drawn[1].shape[1] < length:
                break
            scores = self._score(call.score_fn, condition, drawn[0])
            better = scores > best_scores
            best = (_choose(better, drawn[0], best[0]), _choose(better, drawn[1], best[1]))
            best_scores = torch.where(better, scores, best_scores)
        return best

    def _score(self, score_fn: Scores, condition: Condition, latents: Any) -> torch.Tensor:
        images = self._images(latents, "pt")
        labels = condition.class_labels.to(images.device)
        returned = score_fn(images, labels)
        scores = as_tensor(returned)
        if scores is None or scores.shape != (len(labels),) or scores.is_complex() or not scores.isfinite().all():
            raise ValueError(f"`score_fn` must return {len(labels)} finite numbers, one per image, got {returned!r}.")
        return scores.detach().to(images.device)

    def _scorer(self, codes: torch.Tensor) -> TokenScorer:
        """What gives codes `(batch, length)` their log-probabilities under conditions."""
        raise NotImplementedError

    def _scored_condition(self, class_labels: Labels, given: Mapping[str, Any]) -> Condition:
        """The condition that images are scored under: of labels, or of what is `given` in their place."""
        return class_condition(self.priors[0], class_labels, **given)

    def _decode(self, latents: Any) -> torch.Tensor:
        """Images in [-1, 1], or logits of class maps."""
        return self.vqvae.decode(latents=latents).sample

    def _images(self, latents: Any, output_type: str) -> Any:
        """What was sampled as images in the form that was asked for."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decode(latents), output_type=output_type)

    def _output(self, call: CallSettings, images: Any, codes: torch.Tensor) -> VARPipelineOutput | tuple:
        return VARPipelineOutput(images=images, codes=codes) if call.return_dict else (images, codes)


def _choose(chosen: torch.Tensor, values: Any, others: Any) -> Any:
    """`values` of the `chosen` images `(batch,)`, `others` of the rest; tensors, or tuples of them."""
    if isinstance(values, tuple):
        return tuple(_choose(chosen, *pair) for pair in zip(values, others, strict=True))
    return torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), values, others)
