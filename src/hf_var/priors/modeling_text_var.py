# SPDX-License-Identifier: Apache-2.0
"""The VAR transformer that reads texts: p(token maps | text), predicted scale by scale."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils.output_capturing import capture_outputs

from .cache import VARCache, run_layer
from .configuration_text_var import TextVARConfig
from .layers import VARHeadNorm
from .layers_text_var import (
    CROP_BASE,
    CropEmbedding,
    EmptyText,
    TextVARAttention,
    TextVARBlock,
    TextVARCrossAttention,
    TextVAREmbeddings,
    context_implementation,
)
from .modeling_blocks import BlockTransformer
from .modeling_outputs import VARTransformerOutput
from .rotary import position_angles
from .text_checks import as_crop_sizes, as_text_mask, check_text


class TextCondition(NamedTuple):
    """What the layers are told: the text as one vector, the crop, the text's tokens, and which of these there are."""

    pooled: torch.Tensor
    crop: torch.Tensor | None
    context: torch.Tensor
    mask: torch.Tensor | None


class TextVARTransformer(BlockTransformer):
    r"""
    Visual autoregressive transformer that reads a text by cross-attention (Switti,
    [Voronov et al. 2024](https://huggingface.co/papers/2412.01819)): it predicts each token map from the text and the
    coarser ones, a whole map at once.

    Args:
        config ([`TextVARConfig`]): Sizes and schedule.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import TextVARConfig, TextVARTransformer

    >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_nums": (1, 2)}
    >>> config = TextVARConfig(cross_attention_dim=48, pooled_projection_dim=32, **sizes)
    >>> model = TextVARTransformer(config)
    >>> text = {"encoder_hidden_states": torch.randn(3, 7, 48), "pooled_projections": torch.randn(3, 32)}
    >>> codes = torch.randint(0, config.codebook_size, (3, config.length))
    >>> output = model(**text, scale_inputs=torch.randn(3, config.length - 1, 32), labels=codes)
    >>> output.logits.shape
    torch.Size([3, 5, 4096])
    ```
    """

    config: TextVARConfig
    config_class = TextVARConfig
    base_model_prefix = "text_var"
    main_input_name = "encoder_hidden_states"
    _no_split_modules = ["TextVARBlock"]
    _can_record_outputs = {
        "hidden_states": TextVARBlock,
        "attentions": TextVARAttention,
        "cross_attentions": TextVARCrossAttention,
    }

    def __init__(self, config: TextVARConfig):
        super().__init__(config)
        self.embeddings = TextVAREmbeddings(config)
        self.layers = nn.ModuleList(TextVARBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.head_norm = VARHeadNorm(config)
        self.head = nn.Linear(config.hidden_size, config.codebook_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaRMSNorm):
            is_ungated = any(module is layer.cross_attention_out_norm for layer in self.layers)
            init.constant_(module.weight, self.config.initializer_cross_attention_factor if is_ungated else 1.0)
        elif isinstance(module, TextVARBlock) and module.crop_scale is not None:
            init.zeros_(module.crop_scale)
        elif isinstance(module, CropEmbedding):
            init.normal_(module.frequencies)
        elif isinstance(module, EmptyText):
            # As large as what text encoders return after their last normalisation.
            init.normal_(module.hidden_state)
            init.normal_(module.pooled)

    def _layer_factors(self, layer: TextVARBlock, residual: list[float]) -> dict[nn.Module, list[float]]:
        return {
            layer.adaln.linear: self._adaln_factors(),
            layer.attention.o_proj: residual,
            layer.cross_attention.o_proj: residual,
        }

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        pooled_projections: torch.FloatTensor | None = None,
        crop_sizes: torch.LongTensor | None = None,
        scale_inputs: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> VARTransformerOutput:
        r"""
        Predict consecutive whole scales, beginning where the cache ends.

        The only input of the first scale is the text; every later one reads its part of `scale_inputs`, too. Training
        is the call with all of them and no cache, a sampling step the call with one scale and a cache.

        Args:
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch, length, cross_attention_dim)`, *optional*):
                Hidden states of the text, of several encoders side by side. A [`VARCache`] remembers all of the text,
                so this and the following three are passed with an image's first scale only.
            encoder_attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
                1 for tokens of the text, 0 for padding, in integers or truth values. `None` means all ones, a row of
                zeros no text at all, for `config.learned_empty_text`.
            pooled_projections (`torch.FloatTensor` of shape `(batch, pooled_projection_dim)`, *optional*):
                The text as one vector. It is needed wherever `encoder_hidden_states` are.
            crop_sizes (`torch.LongTensor` of shape `(batch, 2)`, *optional*):
                Height and width of the pictures that the images are square crops from, for `config.crop_conditioning`.
                `None` means that they were square themselves, (512, 512), which is right for sampling.
            scale_inputs (`torch.FloatTensor` of shape `(batch, tokens, latent_channels)`, *optional*):
                Inputs of the scales, from the second one on: [`VQVAEModel.teacher_forcing`] or
                [`VQVAEModel.next_scale`] make them. Left out, the first scale is run alone.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Codes of the scales of this call, for the loss; -100 leaves a token out.
            cache (`Cache`, *optional*):
                What is known of the scales before and of the text, changed in place: a [`VARCache`], or, with
                `config.is_causal`, transformers' `DynamicCache`, which needs the text at every call. Training with
                checkpointed layers computes without a cache.
            use_cache (`bool`, *optional*):
                Whether to make a [`VARCache`] if none is passed.
            past_key_values (`Cache`, *optional*):
                The name of `cache` before transformers 5.24.

        Raises:
            `ValueError`: If the text is missing or passed twice, an argument is of another type or shape, the tokens
                are not whole scales, or layers that are checkpointed would have to read a cache; on the CPU also if a
                label is out of range, a text has no tokens or a size is none.
            `TypeError`: If an argument is unknown.
        """
        call = self._begin_call(cache, past_key_values, use_cache, scale_inputs, labels, kwargs)
        text = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": as_text_mask(encoder_attention_mask, encoder_hidden_states, self.config),
            "pooled_projections": pooled_projections,
            "crop_sizes": as_crop_sizes(crop_sizes, self.config),
        }
        check_text(self.config, call.remembers_condition, text)
        self._check_batch(call, **text, scale_inputs=scale_inputs)

        condition = None if call.remembers_condition else self._embed_text(**text)
        pooled = None if condition is None else condition.pooled
        inputs = self._inputs(call, pooled, scale_inputs)
        return self._end_call(call, self.predict(**inputs, condition=condition, cache=call.cache, **kwargs))

    def embed(
        self, condition: torch.Tensor | None, scale_inputs: torch.Tensor | None, begin: int, length: int
    ) -> dict[str, Any]:
        inputs = super().embed(condition, scale_inputs, begin, length)
        device = inputs["hidden_states"].device
        return {**inputs, "position_embeddings": position_angles(self.config, begin, begin + length, device)}

    def predict(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        condition: TextCondition | None = None,
        attention_mask: Any = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The part of `forward` after the embeddings, which is the same for all scales: logits `(batch, length,
        codebook_size)`, in fp32, of embedded tokens `(batch, length, hidden_size)`. The `condition` is in a
        [`VARCache`] after the first scale.
        """
        if condition is None:
            pooled = crop = context = None
            mask = cache.cross_mask  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        else:
            pooled, crop, context, mask = condition
            if isinstance(cache, VARCache):
                cache.cross_mask = None if mask is None else mask.clone()
        context_mask = None if mask is None else self._context_mask(mask, hidden_states)

        def run(layer: nn.Module, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
            angles = position_embeddings
            if tokens is not None:
                cos, sin = position_embeddings
                angles = cos[tokens].unsqueeze(1), sin[tokens].unsqueeze(1)  # (batch, 1, number, head_dim / 2)
            return layer(
                hidden_states,
                pooled,
                crop,
                context,
                angles,
                context_mask=context_mask,
                attention_mask=attention_mask,
                cache=cache,
                **kwargs,
            )

        for layer_idx, layer in enumerate(self.layers):
            hidden_states = run_layer(cache, layer_idx, partial(run, layer), hidden_states)
        return self.head(self.head_norm(hidden_states, pooled, cache)).float()

    def _embed_text(
        self,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        pooled_projections: torch.Tensor,
        crop_sizes: torch.Tensor | None,
    ) -> TextCondition:
        dtype = self.embeddings.start_position.dtype
        empty_text = self.embeddings.empty_text
        if empty_text is not None and encoder_attention_mask is not None:
            encoder_hidden_states, encoder_attention_mask, pooled_projections = empty_text(
                encoder_hidden_states, encoder_attention_mask, pooled_projections
            )
        pooled = self.embeddings.condition_proj(pooled_projections.to(dtype))
        crop = None
        if self.embeddings.crop_embedding is not None:
            if crop_sizes is None:
                crop_sizes = pooled_projections.new_full((pooled_projections.shape[0], 2), CROP_BASE, dtype=torch.long)
            crop = self.embeddings.crop_embedding(crop_sizes)
        return TextCondition(pooled, crop, encoder_hidden_states.to(dtype), encoder_attention_mask)

    def _context_mask(self, mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The mask `(batch, text length)` in the form that the attention to the text wants, one for all queries."""
        make_mask = ALL_MASK_ATTENTION_FUNCTIONS[context_implementation(self.config)]
        return make_mask(
            batch_size=mask.shape[0],
            q_length=1,
            kv_length=mask.shape[1],
            q_offset=0,
            kv_offset=0,
            mask_function=bidirectional_mask_function,
            attention_mask=mask,
            allow_is_causal_skip=False,
            dtype=hidden_states.dtype,
            device=mask.device,
        )


__all__ = ["TextVARTransformer"]
