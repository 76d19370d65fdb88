# SPDX-License-Identifier: Apache-2.0
"""The RQ-Transformer: p(codes | condition), position by position and at each position depth by depth."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..attention_backends import AttentionBackendMixin
from ..loading import CheckedModelMixin
from ..tensor_checks import as_indices, check_batch, check_floats, check_range
from .cache import cached_batch_size, check_is_dispensable, checkpoints_layers, only_cache
from .checks import IGNORED, as_class_labels, as_targets, check_keywords
from .configuration_rq import RQTransformerConfig
from .layers_rq import RQAttention, RQEmbeddings, RQHead, RQLayer
from .modeling_outputs import RQTransformerOutput
from .stacks import check_stacks


class RQTransformer(CheckedModelMixin, AttentionBackendMixin, PreTrainedModel):
    r"""
    RQ-Transformer (Lee et al. 2022): layers over the positions of an image, which read the sum of each position's codes, and
    layers over the depths of a position, which predict its codes one by one. With one depth and no depth layers it is the
    GPT of VQGAN (Esser et al. 2021).

    Args:
        config ([`RQTransformerConfig`]): Sizes and wiring.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import RQTransformer, RQTransformerConfig

    >>> sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_depth_layers": 1, "num_attention_heads": 2}
    >>> config = RQTransformerConfig(num_labels=10, patch_nums=(4, 4, 4), latent_channels=8, codebook_size=32, **sizes)
    >>> model = RQTransformer(config)
    >>> codes = torch.randint(0, config.codebook_size, (2, config.num_positions, config.depth))
    >>> code_vectors = torch.randn(2, config.num_positions, config.depth, 8)  # `vqvae.code_vectors(codes)`
    >>> output = model(torch.tensor([3, 1]), code_vectors=code_vectors, labels=codes)
    >>> output.logits.shape
    torch.Size([2, 16, 3, 32])
    ```
    """

    config: RQTransformerConfig
    config_class = RQTransformerConfig
    base_model_prefix = "rq_transformer"
    main_input_name = "class_labels"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RQLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Its loss is a mean: transformers' trainer divides by the number of accumulated batches itself.
    accepts_loss_kwargs = False
    _can_record_outputs = {
        "hidden_states": OutputRecorder(RQLayer, layer_name="layers"),
        "attentions": OutputRecorder(RQAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: RQTransformerConfig):
        super().__init__(config)
        self._input_embed_layer = "input_proj" if config.code_inputs == "vectors" else "code_embedding"
        self.embeddings = RQEmbeddings(config)
        self.layers = nn.ModuleList(RQLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.depth_layers = nn.ModuleList(RQLayer(config, layer_idx) for layer_idx in range(config.num_depth_layers))
        self.head = RQHead(config, config.codebook_size, config.depth if config.separate_depth_heads else 1)
        # Where condition tokens are codes, the image's head predicts them as well.
        has_own_head = config.condition_loss_weight > 0 and not config.shared_embedding
        self.condition_head = RQHead(config, config.num_condition_ids, 1) if has_own_head else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.projections[0]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head.projections[0] = new_embeddings

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        class_labels: torch.LongTensor | None = None,
        codes: torch.LongTensor | None = None,
        code_vectors: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        soft_labels: torch.FloatTensor | None = None,
        condition_ids: torch.LongTensor | None = None,
        context: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> RQTransformerOutput:
        r"""
        Without a cache, predict all codes that are passed, each from the condition and the codes before it (training).
        With one, read the condition and codes, beginning where the cache ends (a step of sampling): the last `context` is
        what [`~RQTransformer.predict_depth`] makes the logits of the next position of.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Classes, before an image's first codes only. -1 and `config.num_labels` mean unconditional and so does
                `None`, for models that know an unconditional condition.
            codes (`torch.LongTensor` of shape `(batch, positions, depth)`, *optional*):
                Stacks of codes of consecutive positions, see [`stack_codes`], for `code_inputs="tokens"`.
            code_vectors (`torch.FloatTensor` of shape `(batch, positions, depth, latent_channels)`, *optional*):
                Their vectors, [`VQVAEModel.code_vectors`], for `code_inputs="vectors"`.
            labels (`torch.LongTensor` of shape `(batch, positions, depth)`, *optional*):
                Codes for the loss, usually those that are read; -100 leaves a code out.
            soft_labels (`torch.FloatTensor` of shape `(batch, positions, depth, codebook_size)`, *optional*):
                Probabilities of the codes for the loss, in place of `labels` (Lee et al. 2022, section 3.2.3).
            condition_ids (`torch.LongTensor` of shape `(batch, condition_length)`, *optional*):
                Condition tokens in place of `class_labels`; -1 is unconditional.
            context (`torch.FloatTensor` of shape `(batch, hidden_size)`, *optional*):
                Makes this a call of [`~RQTransformer.predict_depth`].
            cache (`Cache`, *optional*):
                The tokens before, changed in place: any cache of transformers, such as `DynamicCache` or `StaticCache`.
            use_cache (`bool`, *optional*):
                Whether to make a `DynamicCache` if no cache is passed.
            past_key_values (`Cache`, *optional*):
                The name of `cache` before transformers 5.24.

        Raises:
            `ValueError`: If the arguments contradict each other or the configuration, are of another type or shape, the cache
                has no room, or layers that are checkpointed would have to read a cache; on the CPU also if an id is out
                of range.
            `TypeError`: If an argument is unknown.
        """
        cache = only_cache(cache, past_key_values, self.config)
        check_keywords(self, **kwargs)
        stacks = check_stacks(self.config, codes, code_vectors, of_one_position=context is not None)
        if context is not None:
            return self._depth_step(context, stacks, cache, **kwargs)
        is_step = cache is not None or (self.config.use_cache if use_cache is None else use_cache)
        targets = self._as_targets(stacks, labels, soft_labels, is_step)
        if is_step:
            cache = self._usable_cache(cache)
        begin = _begin(cache)
        has_condition = class_labels is not None or condition_ids is not None or stacks is None
        if not has_condition and not isinstance(begin, torch.Tensor):
            has_condition = begin == 0
        # Without a cache the last codes are predicted, but nothing follows that would read them.
        num_read = 0 if stacks is None else stacks.shape[1] - (not is_step)
        self._check_positions(begin, has_condition, num_read, stacks)
        ids = self._condition_ids(class_labels, condition_ids, stacks) if has_condition else None
        check_batch(
            class_labels=class_labels,
            condition_ids=condition_ids,
            codes=stacks,
            labels=targets,
            cache=cached_batch_size(cache),
        )

        hidden_states = self.embeddings(ids, None if stacks is None else stacks[:, :num_read], begin)
        attention_mask = self._mask(hidden_states, has_condition, cache)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, cache=cache, **kwargs)
        first = self.config.condition_length - 1 if has_condition else 0
        contexts, condition_logits = hidden_states[:, first:], None
        if has_condition and self.config.condition_loss_weight > 0:
            head = self.head if self.condition_head is None else self.condition_head
            condition_logits = head(hidden_states[:, :first])
        logits = None if is_step or stacks is None else self._predict_stacks(contexts, stacks, **kwargs)
        return RQTransformerOutput(
            loss=self._loss(logits, targets, condition_logits, ids),
            logits=logits,
            context=contexts,
            condition_logits=condition_logits,
            cache=cache,
        )

    def predict_depth(
        self,
        context: torch.FloatTensor,
        codes: torch.LongTensor | None = None,
        code_vectors: torch.FloatTensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        r"""
        Logits of the next code of a position.

        Args:
            context (`torch.FloatTensor` of shape `(batch, hidden_size)`):
                The last `context` of a call of the model.
            codes (`torch.LongTensor` of shape `(batch, depths)`, *optional*):
                Codes of the position so far, all of them; none for the first one.
            code_vectors (`torch.FloatTensor` of shape `(batch, depths, latent_channels)`, *optional*):
                Their vectors, for `code_inputs="vectors"`.
            cache (`Cache`, *optional*):
                The depths before, changed in place: a `DynamicCache()`, or a `StaticCache(config.depth_config,
                config.depth)`, empty at the first code of each position. Without one all depths are computed again.

        Returns:
            `torch.FloatTensor` of shape `(batch, codebook_size)`, in fp32.

        Raises:
            `ValueError`: If the codes do not follow the cache, or are as many as the position has.
        """
        return self(context=context, codes=codes, code_vectors=code_vectors, cache=cache, return_dict=True).logits

    def _depth_step(
        self, context: torch.Tensor, stacks: torch.Tensor | None, cache: Cache | None, **kwargs
    ) -> RQTransformerOutput:
        """The logits of a position's next code, in a call that reads what the cache does not hold."""
        check_floats("context", context)
        if context.ndim != 2 or context.shape[1] != self.config.hidden_size:
            raise ValueError(
                f"`context` must have the shape (batch, {self.config.hidden_size}), got {tuple(context.shape)}."
            )
        depth = 0 if stacks is None else stacks.shape[1]
        if depth >= self.config.depth:
            raise ValueError(f"`codes` must be fewer than the {self.config.depth} of a position, got {depth}.")
        begin = _begin(cache)
        if isinstance(begin, torch.Tensor):
            # Compiled, with a static cache: what is read must not depend on its contents.
            begin = depth
        if begin > depth:
            raise ValueError(
                f"`cache` must be empty at a position's first code and hold at most {depth} depths, got {begin}."
            )
        check_batch(context=context, codes=stacks, cache=cached_batch_size(cache))
        tokens = self.embeddings.depth_inputs(context, stacks)[:, begin:]
        hidden_states = self._run_depth_layers(tokens, cache, **kwargs)[:, -1:]
        return RQTransformerOutput(logits=self.head(hidden_states, depth)[:, 0], cache=cache)

    def _predict_stacks(self, contexts: torch.Tensor, stacks: torch.Tensor, **kwargs) -> torch.Tensor:
        """Logits `(batch, positions, depth, codebook_size)` of whole stacks, each code given those before it."""
        batch_size, num_positions = stacks.shape[:2]
        before = stacks[:, :, :-1].flatten(0, 1) if len(self.depth_layers) > 0 else None
        tokens = self.embeddings.depth_inputs(contexts.flatten(0, 1), before)
        logits = self.head(self._run_depth_layers(tokens, None, **kwargs))
        return logits.unflatten(0, (batch_size, num_positions))

    def _run_depth_layers(self, tokens: torch.Tensor, cache: Cache | None, **kwargs) -> torch.Tensor:
        if len(self.depth_layers) == 0:
            return tokens
        attention_mask = create_causal_mask(self.config, tokens, None, cache)
        for layer in self.depth_layers:
            tokens = layer(tokens, attention_mask=attention_mask, cache=cache, **kwargs)
        return tokens

    def _mask(self, hidden_states: torch.Tensor, has_condition: bool, cache: Cache | None):
        """The causal mask in the form that the attention wants, `None` where it needs none."""
        num_condition = self.config.condition_length
        if not has_condition or not self.config.bidirectional_condition or num_condition == 1:
            return create_causal_mask(self.config, hidden_states, None, cache)
        if "flash" in str(self.config._attn_implementation):
            raise ValueError(
                f"The attention implementation {self.config._attn_implementation!r} has no mask for "
                "`bidirectional_condition`: use 'sdpa', 'eager' or 'flex_attention'."
            )

        def is_in_condition(batch_idx, head_idx, query_idx, key_idx):
            return (query_idx < num_condition) & (key_idx < num_condition)

        return create_causal_mask(self.config, hidden_states, None, cache, or_mask_function=is_in_condition)

    def _condition_ids(
        self, class_labels: torch.Tensor | None, condition_ids: torch.Tensor | None, stacks: torch.Tensor | None
    ) -> torch.Tensor:
        """Condition tokens `(batch, condition_length)`, -1 where they are unconditional."""
        config = self.config
        num_labels, has_unconditional = config.num_labels or 0, config.unconditional_id is not None
        has_classes = config.has_classes
        if class_labels is not None and condition_ids is not None:
            raise ValueError("Pass one of `class_labels` and `condition_ids`, not both.")
        if class_labels is not None:
            if not has_classes:
                raise ValueError("`class_labels` need a model of classes: pass `condition_ids` to this one.")
            classes = as_class_labels(class_labels, num_labels, has_unconditional)
            # Both -1 and the number of labels are unconditional.
            ids = torch.where(classes == num_labels, -1, classes)[:, None]
        elif condition_ids is not None:
            ids = as_indices("condition_ids", condition_ids)
            if ids.ndim != 2 or ids.shape[1] != config.condition_length:
                raise ValueError(
                    f"`condition_ids` must have the shape (batch, {config.condition_length}), got {tuple(ids.shape)}."
                )
            accepted = f"in [0, {config.num_condition_ids})" + ", or -1 for unconditional" * has_unconditional
            check_range("condition_ids", ids, -has_unconditional, config.num_condition_ids - 1, accepted)
        else:
            if not has_unconditional:
                raise ValueError(
                    f"`{'class_labels' if has_classes else 'condition_ids'}` must be passed: this model knows no "
                    "unconditional condition, since it has class_dropout_prob=0."
                )
            device = self.embeddings.position_embedding.weight.device if stacks is None else stacks.device
            # The weights of offloaded models are on no device; hooks bring inputs along from the CPU.
            device = torch.device("cpu") if device.type == "meta" else device
            ids = torch.full((1 if stacks is None else stacks.shape[0], config.condition_length), -1, device=device)
        if self.training and config.class_dropout_prob > 0:
            dropped = torch.rand(ids.shape[:1], device=ids.device) < config.class_dropout_prob
            ids = torch.where(dropped[:, None], -1, ids)
        return ids

    def _loss(
        self,
        logits: torch.Tensor | None,
        targets: torch.Tensor | None,
        condition_logits: torch.Tensor | None,
        condition_ids: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Mean cross-entropy of the codes and, with its weight, of the condition tokens after the first."""
        if logits is None or targets is None:
            return None
        targets = targets.flatten(0, 2)
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        loss = functional.cross_entropy(logits.flatten(0, 2), targets, label_smoothing=self.config.label_smoothing)
        if condition_logits is not None and condition_ids is not None:
            # Tokens of an unconditional condition have no id to be predicted.
            tokens = torch.where(condition_ids < 0, IGNORED, condition_ids)[:, 1:]
            losses = functional.cross_entropy(condition_logits.mT, tokens, reduction="none")
            weight = self.config.condition_loss_weight
            loss = (1 - weight) * loss + weight * losses.sum() / (tokens >= 0).sum().clamp(min=1)
        return loss

    def _usable_cache(self, cache: Cache | None) -> Cache | None:
        """The cache of a step, a new one if none is passed; none where layers are checkpointed."""
        cache = DynamicCache() if cache is None else cache
        if not checkpoints_layers(self.layers):
            return cache
        check_is_dispensable(cache)
        return None

    def _as_targets(
        self, stacks: torch.Tensor | None, labels: torch.Tensor | None, soft_labels: torch.Tensor | None, is_step: bool
    ) -> torch.Tensor | None:
        """What the loss compares with: codes or their probabilities."""
        if labels is not None and soft_labels is not None:
            raise ValueError("Pass one of `labels` and `soft_labels`, not both.")
        if labels is None and soft_labels is None:
            return None
        if is_step or stacks is None:
            name = "labels" if soft_labels is None else "soft_labels"
            raise ValueError(f"`{name}` need codes to predict and a call without a cache.")
        if soft_labels is None:
            return as_targets(labels, stacks.shape[1:3], self.config.codebook_size)
        check_floats("soft_labels", soft_labels)
        shape = (*stacks.shape[:3], self.config.codebook_size)
        if soft_labels.shape != shape:
            raise ValueError(
                f"`soft_labels` must have the shape {shape} of the codes, got {tuple(soft_labels.shape)}."
            )
        return soft_labels

    def _check_positions(
        self, begin: int | torch.Tensor, has_condition: bool, num_read: int, stacks: torch.Tensor | None
    ) -> None:
        num_condition = self.config.condition_length
        if isinstance(begin, torch.Tensor):
            return
        if begin > 0 and has_condition:
            name = "codes" if stacks is None else "class_labels"
            raise ValueError(
                f"`{name}` must be passed with {'every call but' if stacks is None else 'no call but'} an image's first, "
                f"and this cache holds {begin} tokens."
            )
        if 0 < begin < num_condition:
            raise ValueError(
                f"`cache` must hold the whole condition of {num_condition} tokens or nothing, got {begin}."
            )
        end = (num_condition if has_condition else begin) + num_read
        if end > num_condition + self.config.num_positions - 1:
            raise ValueError(
                f"Codes of at most {self.config.num_positions - 1} positions can be read after the condition, since nothing "
                f"follows the last, got {end - num_condition}."
            )


def _begin(cache: Cache | None) -> int | torch.Tensor:
    """Tokens in the cache. A static cache counts on its device; compiled code must not read that."""
    begin = 0 if cache is None else cache.get_seq_length()
    return begin if torch.compiler.is_compiling() else int(begin)


__all__ = ["RQTransformer"]
