# SPDX-License-Identifier: Apache-2.0
"""Images from texts: the condition of a transformer that reads them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..autoencoders import VQVAEModel
from ..priors import TextVARConfig, TextVARTransformer
from ..ranges import NonNegativeInt, checked
from ..text_encoders import TextEmbeddings
from .base import Prepared
from .checks import check_count, check_flag
from .components import check_components
from .conditions import Condition, Labels
from .options import CallSettings, PromptOptions, TextCallOptions, show_options
from .pipeline_var import ScalePipeline
from .sampling import GuidanceRule, SmoothRule
from .text_encoding import Prompts, check_text_encoders, embed_prompts, prompt_condition, run_text_encoders


class VARTextToImagePipeline(ScalePipeline):
    r"""
    Text-to-image generation with a VAR transformer that reads texts (Switti,
    [Voronov et al. 2024](https://huggingface.co/papers/2412.01819)): one step per scale, from a 1x1 token map to the
    full grid.

    Args:
        transformer ([`TextVARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Turns token maps into images.
        text_encoder (`CLIPTextModel`, *optional*):
            Makes the hidden states of texts. Without text encoders, calls need embeddings.
        tokenizer (`CLIPTokenizer`, *optional*): Its tokenizer.
        text_encoder_2 (`CLIPTextModel`, *optional*):
            A second text encoder, whose hidden states come behind those of the first. The last one makes the pooled
            vector.
        tokenizer_2 (`CLIPTokenizer`, *optional*): Its tokenizer. The mask of the last tokenizer is that of all.
        guidance_scale (`float`, *optional*, defaults to 7.0):
            What `guidance_scale=None` means in a call. It travels with the checkpoint in `model_index.json`, like the
            following ones.
        top_k (`int`, *optional*, defaults to 400): What `top_k=None` means in a call, or all of a smaller codebook.
        top_p (`float`, *optional*, defaults to 0.95): What `top_p=None` means in a call.
        temperature (`float`, *optional*, defaults to 1.0): What `temperature=None` means in a call.
        smooth_rule (`str`, *optional*, defaults to `"plain"`):
            What `smooth=True` does: `"plain"` mixes the code vectors by all logits and draws no codes, as in Switti;
            `"filtered"` by those that the filters leave, and draws codes as well, as in VAR.
        guidance_rule (`str`, *optional*, defaults to `"linear"`):
            How guidance grows over the scales: `"linear"`, from 1 at the first one, or `"constant"`, not at all.

    Raises:
        `ValueError`: If models do not belong together (codebooks, latents, schedules, or widths of the text encoders
            differ), a text encoder projects its pooled vectors, or a value is out of range.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer"
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    call_options = TextCallOptions.__optional_keys__
    scored_conditions = ("prompt", "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask", "original_size")

    def __init__(
        self,
        transformer: TextVARTransformer,
        vqvae: VQVAEModel,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        guidance_scale: float = 7.0,
        top_k: int = 400,
        top_p: float = 0.95,
        temperature: float = 1.0,
        smooth_rule: str = "plain",
        guidance_rule: str = "linear",
    ):
        super().__init__()
        check_components(transformer, vqvae, TextVARConfig)
        check_text_encoders(transformer.config, (text_encoder, text_encoder_2), (tokenizer, tokenizer_2))
        top_k = checked("top_k", top_k, NonNegativeInt)
        smooth_rule = checked("smooth_rule", smooth_rule, SmoothRule)
        self.register_modules(
            transformer=transformer,
            vqvae=vqvae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self._set_defaults(guidance_scale, top_p, temperature)
        guidance_rule = checked("guidance_rule", guidance_rule, GuidanceRule)
        self.register_to_config(top_k=top_k, smooth_rule=smooth_rule, guidance_rule=guidance_rule)

    @show_options
    @torch.no_grad()
    def __call__(self, prompt: str | Sequence[str] | None = None, **options: Unpack[TextCallOptions]) -> Any:
        r"""
        Generate images.

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts, one image each. Longer ones are cut off, with a warning.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to the empty text):
                What guidance leads away from, one text for all images or one for each prompt. By default, a model with
                `learned_empty_text` reads its own vectors.
            prompt_embeds (`torch.FloatTensor` of shape `(batch, length, cross_attention_dim)`, *optional*):
                Hidden states of texts in place of `prompt`, see [`~VARTextToImagePipeline.encode_prompt`], which also
                describes the following five.
            negative_prompt_embeds (`torch.FloatTensor`, *optional*): The same in place of `negative_prompt`.
            pooled_prompt_embeds (`torch.FloatTensor` of shape `(batch, pooled_projection_dim)`, *optional*):
                The texts as vectors. It goes with `prompt_embeds`.
            negative_pooled_prompt_embeds (`torch.FloatTensor`, *optional*): The same of the negative texts.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens of the texts, 0 for padding. It goes with `prompt_embeds`.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): The same of the negative texts.
            original_size (`tuple[int, int]` or a list of them, *optional*, defaults to `(512, 512)`):
                Height and width of the picture that the model shall take an image for a square crop of, for
                `crop_conditioning`; other aspects than 1 give images that look cropped.
            guidance_scale (`float` or `Callable`, *optional*, defaults to the checkpoint's, 7.0 if it has none):
                Classifier-free guidance at the last scale, 1 is off; it grows linearly from 1 at the first scale, or is
                the same at all scales by the checkpoint's `guidance_rule`. The official code's `cfg` is `guidance_scale - 1`. A callable of the scale k and the number of scales K
                gives the weight of each scale.
            guidance_start (`int`, *optional*, defaults to 0):
                First scale that is guided (official `turn_on_cfg_start_si`), for more variety.
            guidance_end (`int`, *optional*):
                First scale that is not guided any more (official `turn_off_cfg_start_si`); from there on, the
                unconditional half is not computed. `None` means that all are.
            top_k (`int` or list of them, *optional*, defaults to the checkpoint's, 400 if it has none):
                Sample from this many most likely codes, or all of a smaller codebook; 0 means all. A list has one
                value per scale, here and below.
            top_p (`float` or list of them, *optional*, defaults to the checkpoint's, 0.95 if it has none):
                Sample from the most likely codes of this joint probability; 0 and 1 mean all.
            temperature (`float` or list of them, *optional*, defaults to the checkpoint's, 1.0 if it has none):
                Divides the guided logits. The official `last_scale_temp` is that of the scales from `guidance_end` on,
                all of them: `[1.0] * guidance_end + [last_scale_temp] * (K - guidance_end)`.
            smooth (`bool`, *optional*, defaults to `False`):
                Mix code vectors instead of choosing one (official `more_smooth`), by the checkpoint's `smooth_rule`.
                By the plain one, scales from `guidance_end` on are not mixed, and the returned codes of the others are
                those of the largest weight.
            smooth_start (`int`, *optional*, defaults to 0): First scale of which code vectors are mixed.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt, next to each other.
            generator (`torch.Generator` or a list of them, *optional*):
                Source of randomness, on any device. With a list, one for each image, an image does not depend on the
                others of its batch.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`VARPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, k, k, {"latents": latents})`. It may return a dictionary
                with other `latents`, from which the next scale continues.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Tensors that the callback gets: `latents`, and `images` `(batch, channels, height, width)` in [0, 1],
                which are decoded for it.
            logits_processor (`LogitsProcessor` or `LogitsProcessorList`, *optional*):
                Changes the guided logits of a scale, as of [`VARPipeline`].
            refiner ([`TextVARTransformer`], *optional*):
                Another, smaller transformer that samples the scales from `refiner_start` on, as of [`VARPipeline`].
            refiner_start (`int`, *optional*): First scale of the `refiner`.
            layer_hooks (`list[LayerHook]`, *optional*): Changes of what the layers compute, as of [`VARPipeline`].
            num_candidates (`int`, *optional*, defaults to 1):
                Number of candidates for each image; the one with the highest `score_fn` is kept (rejection sampling).
            score_fn (`Callable`, *optional*):
                Called as `score_fn(images, numbers)` with images in [0, 1] and, for each, the number of its prompt,
                from 0 on; returns a number for each.

        Returns:
            [`VARPipelineOutput`] or a tuple of its fields.

        Raises:
            `ValueError`: If an argument is out of range, embeddings are passed in part, or texts are passed to a
                pipeline without text encoders, before anything is sampled.
            `TypeError`: If an argument is unknown.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import TextVARConfig, TextVARTransformer, VARTextToImagePipeline, VQVAEConfig, VQVAEModel

        >>> schedule = {"patch_nums": (1, 2, 4), "codebook_size": 64}
        >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> config = TextVARConfig(cross_attention_dim=48, pooled_projection_dim=32, **sizes, **schedule)
        >>> vqvae = VQVAEModel(VQVAEConfig(base_channels=32, channel_multipliers=(1, 2), **schedule))
        >>> pipe = VARTextToImagePipeline(TextVARTransformer(config), vqvae)  # a released one also has text encoders
        >>> text = {"prompt_embeds": torch.randn(1, 7, 48), "pooled_prompt_embeds": torch.randn(1, 32)}
        >>> image = pipe(**text, prompt_attention_mask=torch.ones(1, 7).long(), guidance_scale=1.0).images[0]
        ```
        """
        return self._generate(self._preparation(prompt, options))

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        r"""
        What a call makes of its texts, to be used for several calls. What is given is returned.

        The hidden states are those after the last normalisation of each text encoder, side by side, and the pooled
        vector is that of the last encoder, without a projection; the `prompt_embeds` of SDXL are others.

        Args:
            prompt (`str` or `list[str]`, *optional*): Texts.
            device (`torch.device`, *optional*): Where to put the result, by default where the pipeline computes.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                How often to repeat each text, next to each other, for a call without this argument.
            do_classifier_free_guidance (`bool`, *optional*, defaults to `True`): Whether to encode negative texts.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to the empty text):
                One text for all, or one for each prompt.
            prompt_embeds (`torch.FloatTensor` of shape `(batch, length, cross_attention_dim)`, *optional*):
                Hidden states in place of `prompt`.
            negative_prompt_embeds (`torch.FloatTensor`, *optional*):
                Those in place of `negative_prompt`; here and below one text may serve all.
            pooled_prompt_embeds (`torch.FloatTensor` of shape `(batch, pooled_projection_dim)`, *optional*):
                Goes with `prompt_embeds`.
            negative_pooled_prompt_embeds (`torch.FloatTensor`, *optional*):
                Goes with `negative_prompt_embeds`.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens, 0 for padding; goes with `prompt_embeds`.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*):
                Goes with `negative_prompt_embeds`.

        Returns:
            `tuple`: `prompt_embeds`, `negative_prompt_embeds`, `pooled_prompt_embeds`,
            `negative_pooled_prompt_embeds`, `prompt_attention_mask` and `negative_prompt_attention_mask`, as many of
            each as there are prompts, times `num_images_per_prompt`. The negative ones are `None` without
            classifier-free guidance.

        Raises:
            `ValueError`: If there are no texts or no text encoders for them, embeddings are passed in part, or their
                shapes do not fit.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        check_flag("do_classifier_free_guidance", do_classifier_free_guidance)
        prompts = Prompts(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        config = self.transformer.config
        text, negative = embed_prompts(prompts, config, do_classifier_free_guidance, self._run_encoders)
        device = self._execution_device if device is None else torch.device(device)
        number = len(text.pooled)
        found: list[torch.Tensor | None] = []
        for position in range(len(text)):
            for part in (text, negative):
                values = None if part is None else part[position].to(device)
                if values is not None:
                    values = values.expand(number, *values.shape[1:]).repeat_interleave(num_images_per_prompt, dim=0)
                found.append(values)
        return tuple(found)

    def _run_encoders(self, texts: Mapping[str, Sequence[str]]) -> dict[str, TextEmbeddings]:
        """The embeddings of the texts of several arguments."""
        with self._at_work(self.text_encoder, self.text_encoder_2) as device:
            return run_text_encoders(self.components, texts, device)

    def _preparation(self, prompt: Any, options: Mapping[str, Any]) -> Callable[..., Prepared]:
        """What checks the arguments of a call and makes the condition of its texts."""
        of_text = {name: options[name] for name in PromptOptions.__optional_keys__ & options.keys()}
        others = {name: value for name, value in options.items() if name not in of_text}
        original_size = of_text.pop("original_size", None)
        condition = partial(self._condition_of_call, Prompts(prompt, **of_text), original_size)
        return partial(self._prepare, None, others, condition)

    def _condition_of_call(self, prompts: Prompts, original_size: Any, call: CallSettings) -> Condition:
        guided = call.sampling.last_guided_scale(len(self.vqvae.config.patch_nums)) >= 0
        return prompt_condition(prompts, original_size, self.transformer.config, guided, self._run_encoders)

    def _scored_condition(self, class_labels: Labels, given: Mapping[str, Any]) -> Condition:
        if class_labels is not None:
            raise ValueError(
                f"`class_labels` must be None for a pipeline of texts, which `prompt` has, got {class_labels!r}."
            )
        others = dict(given)
        original_size = others.pop("original_size", None)
        config = self.transformer.config
        return prompt_condition(Prompts(**others), original_size, config, guided=False, encode=self._run_encoders)
