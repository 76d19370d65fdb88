# SPDX-License-Identifier: Apache-2.0
"""The VAR transformer: p(token maps | class), predicted block by block."""

import math
from functools import partial

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import capture_outputs

from .cache import run_layer
from .checks import as_class_labels, check_class_embeds
from .configuration_var import VARConfig
from .layers import AdaLN, AdaLNOffset, VARAttention, VARBlock, VAREmbeddings, VARHeadNorm
from .modeling_blocks import BlockTransformer
from .modeling_outputs import VARTransformerOutput


class VARTransformer(BlockTransformer):
    r"""
    Visual autoregressive transformer (Tian et al. 2024): it predicts each token map from the class and all coarser
    ones, a whole map at once.

    Args:
        config ([`VARConfig`]): Sizes and schedule.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import VARConfig, VARTransformer

    >>> config = VARConfig(num_labels=10, patch_nums=(1, 2), hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model = VARTransformer(config)
    >>> codes = torch.randint(0, config.codebook_size, (3, config.length))
    >>> output = model(torch.tensor([3, 1, 4]), scale_inputs=torch.randn(3, config.length - 1, 32), labels=codes)
    >>> output.logits.shape
    torch.Size([3, 5, 4096])
    ```
    """

    config: VARConfig
    config_class = VARConfig
    base_model_prefix = "var"
    main_input_name = "class_labels"
    _no_split_modules = ["VARBlock"]
    _can_record_outputs = {"hidden_states": VARBlock, "attentions": VARAttention}

    def __init__(self, config: VARConfig):
        super().__init__(config)
        self.embeddings = VAREmbeddings(config)
        self.shared_adaln = AdaLN(config, 6) if config.shared_adaln else None
        self.layers = nn.ModuleList(VARBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.head_norm = VARHeadNorm(config)
        self.head = nn.Linear(config.hidden_size, config.codebook_size)
        self.post_init()

    def set_labels(self, id2label: dict[int, str] | None) -> None:
        """
        Change the label set in place: configuration and class embedding, whose unconditional row stays as it is.

        Labels whose name both sets have keep their embedding. All others begin as the unconditional class, so
        that the model samples sensible images from the first step on; a random embedding would mislead every layer.

        The class embedding gets a new parameter, so this comes before the optimizer, the average of the weights and
        wrappers such as DDP.

        Args:
            id2label (`dict[int, str]`): Names of the new labels; `None` for an unconditional model.

        Raises:
            `ValueError`: If `id2label` does not name the ids from 0 on, or if the class embedding is part of an
                adapter or offloaded.
        """
        embedding = self.embeddings.class_embedding
        is_offloaded = hasattr(embedding, "_hf_hook") and embedding.weight.device.type == "meta"
        if type(embedding) is not nn.Embedding or is_offloaded:
            raise ValueError(
                "`set_labels` needs the plain class embedding, but an adapter or an offloading hook holds it: "
                "change the labels before these are added, or remove them first."
            )
        known: dict[str, list[int]] = {}
        for label, name in sorted((self.config.id2label or {}).items()):
            known.setdefault(name, []).append(int(label))
        unconditional = self.embeddings.num_labels
        self.config.set_labels(id2label)
        # Of labels that share a name, the first takes the first one's row, and so on.
        names = (self.config.id2label or {}).values()
        rows = [known[name].pop(0) if known.get(name) else unconditional for name in names]
        self.embeddings.choose_labels(rows)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AdaLNOffset):
            factors = torch.tensor(self._adaln_factors()).to(module.offset).unsqueeze(1)
            init.copy_(module.offset, torch.randn_like(module.offset) * factors / self.config.hidden_size**0.5)
        elif isinstance(module, VARAttention) and module.log_query_scale is not None:
            init.constant_(module.log_query_scale, math.log(4))

    def _layer_factors(self, layer: VARBlock, residual: list[float]) -> dict[nn.Module, list[float]]:
        factors: dict[nn.Module, list[float]] = {layer.attention.o_proj: residual, layer.mlp.fc2: residual}
        if isinstance(layer.adaln, AdaLN):
            factors[layer.adaln.linear] = self._adaln_factors()
        return factors

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        class_labels: torch.LongTensor | None = None,
        scale_inputs: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        class_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> VARTransformerOutput:
        r"""
        Predict consecutive whole blocks, beginning where the cache ends.

        The only input of the first block is the class; every later one reads its part of `scale_inputs`. Training is the
        call with all of them and no cache, a sampling step the call with one block and a cache.

        Args:
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Classes; -1 and `config.num_labels` mean unconditional, and so does `None` on an empty cache. A
                [`VARCache`] remembers the class after the first call.
            scale_inputs (`torch.FloatTensor` of shape `(batch, tokens, latent_channels)`, *optional*):
                Inputs of the blocks, from the second one on: [`VQVAEModel.teacher_forcing`] or
                [`VQVAEModel.next_scale`] make them. Left out, the first block is run alone.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Codes of the blocks of this call, for the loss; -100 leaves a token out.
            class_embeds (`torch.FloatTensor` of shape `(batch, config.condition_size)`, *optional*):
                Class embeddings in place of `class_labels`, for instance between two classes or from another model.
            cache (`Cache`, *optional*):
                The blocks before, changed in place: a [`VARCache`], or transformers' `DynamicCache`, which needs the
                class at every call. Training with checkpointed layers computes without a cache.
            use_cache (`bool`, *optional*):
                Whether to make a [`VARCache`] if none is passed.
            past_key_values (`Cache`, *optional*):
                The name of `cache` before transformers 5.24.

        Raises:
            `ValueError`: If the arguments contradict each other, are of another type or shape, the tokens are not whole
                blocks, or layers that are checkpointed would have to read a cache; on the CPU also if a label is out of
                range.
            `TypeError`: If an argument is unknown.
        """
        call = self._begin_call(cache, past_key_values, use_cache, scale_inputs, labels, kwargs)
        if class_labels is not None:
            class_labels = as_class_labels(class_labels, self.embeddings.num_labels)
        if class_embeds is not None:
            check_class_embeds(class_embeds, self.config)
        self._check_batch(call, class_labels=class_labels, class_embeds=class_embeds, scale_inputs=scale_inputs)

        if call.remembers_condition:
            if class_embeds is not None:
                raise ValueError("`class_embeds` must be passed with an image's first block only: the cache keeps it.")
            class_embedding = condition = None
        else:
            embeds = self._embed_class(class_labels, class_embeds, scale_inputs, labels, call.begin)
            class_embedding = self.embeddings.project_condition(embeds)
            condition = class_embedding if self.shared_adaln is None else self.shared_adaln(class_embedding)

        inputs = self._inputs(call, class_embedding, scale_inputs)
        logits = self.predict(
            **inputs, condition=condition, class_embedding=class_embedding, cache=call.cache, **kwargs
        )
        return self._end_call(call, logits)

    def predict(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor | None = None,
        class_embedding: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        The part of `forward` after the embeddings, which is the same for all blocks: logits `(batch, length,
        codebook_size)`, in fp32, of embedded tokens `(batch, length, hidden_size)`. What depends on the class alone,
        `condition` and `class_embedding`, is in a [`VARCache`] after the first block.
        """

        def run(layer: nn.Module, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
            # Positions are in the embeddings, so that a layer does not need to know which tokens these are.
            return layer(hidden_states, condition, attention_mask=attention_mask, cache=cache, **kwargs)

        for layer_idx, layer in enumerate(self.layers):
            hidden_states = run_layer(cache, layer_idx, partial(run, layer), hidden_states)
        return self.head(self.head_norm(hidden_states, class_embedding, cache)).float()

    def get_class_embeds(self, class_labels: torch.LongTensor) -> torch.Tensor:
        """
        The embeddings of `(batch,)` class labels: `class_embeds` of shape `(batch, config.condition_size)`; -1 and
        `config.num_labels` are unconditional. A `ValueError` if they do not fit or the weights are offloaded.
        """
        if (device := self.embeddings.class_embedding.weight.device).type == "meta":
            raise ValueError("`get_class_embeds` needs the class embedding, which is offloaded: call it before.")
        return self.embeddings.embed_labels(as_class_labels(class_labels, self.embeddings.num_labels).to(device))

    def _embed_class(
        self,
        class_labels: torch.Tensor | None,
        class_embeds: torch.Tensor | None,
        scale_inputs: torch.Tensor | None,
        labels: torch.Tensor | None,
        begin: int,
    ) -> torch.Tensor:
        num_labels = self.embeddings.num_labels
        if class_embeds is not None:
            if class_labels is not None:
                raise ValueError("Pass one of `class_labels` and `class_embeds`, not both.")
            class_embeds = class_embeds.to(self.embeddings.start_position.dtype)
            if not self.training:
                return class_embeds
            # Even if no row is dropped: distributed training waits for a gradient of every parameter.
            unconditional = torch.full(class_embeds.shape[:1], num_labels, device=class_embeds.device)
            dropped = self._dropped_classes(unconditional)
            return torch.where(dropped[:, None], self.embeddings.embed_labels(unconditional), class_embeds)
        if class_labels is None:
            if begin > 0:
                raise ValueError(
                    "`class_labels` must be passed at every call with a cache which is not a `VARCache`, because only "
                    "that one remembers the class."
                )
            example = labels if scale_inputs is None else scale_inputs
            batch_size = 1 if example is None else example.shape[0]
            device = self.embeddings.start_position.device if example is None else example.device
            if device.type == "meta":
                # The weights are offloaded; the hooks that bring them back bring inputs from the CPU along.
                device = torch.device("cpu")
            class_labels = torch.full((batch_size,), num_labels, device=device)
        if self.training and self.config.class_dropout_prob > 0:
            class_labels = torch.where(self._dropped_classes(class_labels), num_labels, class_labels)
        return self.embeddings.embed_labels(class_labels)

    def _dropped_classes(self, class_labels: torch.Tensor) -> torch.Tensor:
        """Which images lose their class: classifier-free guidance needs the unconditional one, too (Ho and Salimans 2022)."""
        return torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout_prob


__all__ = ["VARTransformer", "VARTransformerOutput"]
