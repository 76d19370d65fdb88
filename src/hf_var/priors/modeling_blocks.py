# SPDX-License-Identifier: Apache-2.0
"""What the transformers of whole blocks share: the step protocol, its checks, the loss and the initial weights."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..attention_backends import AttentionBackendMixin
from ..loading import CheckedModelMixin
from ..tensor_checks import check_batch
from .attention import block_mask
from .cache import VARCache, cached_batch_size, check_is_dispensable, checkpoints_layers, only_cache
from .checks import as_targets, check_blocks, check_keywords
from .layers import BlockEmbeddings, VARHeadNorm
from .modeling_outputs import VARTransformerOutput


class BlockCall(NamedTuple):
    """What a call covers: consecutive whole blocks, beginning where the cache ends, and the codes for its loss."""

    cache: Cache | None
    begin: int
    length: int
    num_blocks: int
    labels: torch.Tensor | None

    @property
    def remembers_condition(self) -> bool:
        """Whether the cache holds what depends on the condition alone."""
        return self.begin > 0 and isinstance(self.cache, VARCache)


class BlockTransformer(CheckedModelMixin, AttentionBackendMixin, PreTrainedModel):
    """
    A transformer over the tokens of all scales, which predicts them block by block. A subclass embeds its condition,
    and runs its layers in `predict`.
    """

    config: Any
    embeddings: Any
    layers: nn.ModuleList
    head_norm: VARHeadNorm
    head: nn.Module

    input_modalities = "image"
    supports_gradient_checkpointing = True
    _input_embed_layer = "input_proj"
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Its loss is a mean: transformers' trainer divides by the number of accumulated batches itself.
    accepts_loss_kwargs = False

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        The official scheme: all weights Gaussian with `config.initial_std`, residual branches narrowed with depth, and
        AdaLN such that every branch starts nearly closed.
        """
        # Rules are for modules that own parameters: outside its package, transformers passes over all others.
        std = self.config.initial_std
        if isinstance(module, nn.Linear):
            factors = torch.tensor(self._initial_factors().get(module, [1.0])).to(module.weight)
            factors = factors.repeat_interleave(module.out_features // len(factors)).unsqueeze(1)
            init.copy_(module.weight, torch.randn_like(module.weight) * std * factors)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, BlockEmbeddings):
            for weight in module.parameters(recurse=False):
                init.trunc_normal_(weight, std=std)

    def _adaln_factors(self) -> list[float]:
        """Factors on the initial weights of a layer's six modulation vectors, of which the first two gate branches."""
        return [self.config.initializer_adaln_gamma_factor] * 2 + [self.config.initializer_adaln_factor] * 4

    def _initial_factors(self) -> dict[nn.Module, list[float]]:
        """Factors on the initial weights of the projections that have any, for equal parts of their rows."""
        factors: dict[nn.Module, list[float]] = {
            self.head: [self.config.initializer_head_factor],
            self.head_norm.adaln.linear: [self.config.initializer_adaln_factor],
        }
        residual = [1 / math.sqrt(2 * self.config.num_hidden_layers)]
        for layer in self.layers:
            factors |= self._layer_factors(layer, residual)
        return factors

    def _layer_factors(self, layer: Any, residual: list[float]) -> dict[nn.Module, list[float]]:
        """Factors of a layer, `residual` where a branch ends."""
        raise NotImplementedError

    def embed(
        self, condition: torch.Tensor | None, scale_inputs: torch.Tensor | None, begin: int, length: int
    ) -> dict[str, Any]:
        """
        What `predict` reads of the tokens from `begin` on: the embedded tokens, and what else depends on their places.
        `condition` is the embedding that the first block begins with.
        """
        return {"hidden_states": self.embeddings(condition, scale_inputs, begin)}

    def predict(self, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """The part of `forward` after the embeddings, which is the same for all blocks."""
        raise NotImplementedError

    def _begin_call(
        self, cache: Any, past_key_values: Any, use_cache: bool | None, scale_inputs: Any, labels: Any, keywords: Any
    ) -> BlockCall:
        """Check the arguments that all models have; a `ValueError` that names the one that is wrong."""
        config = self.config
        cache = only_cache(cache, past_key_values, config)
        check_keywords(self, **keywords)
        if use_cache is None:
            use_cache = config.use_cache
        if cache is None and use_cache:
            cache = VARCache(config)
        if cache is not None and checkpoints_layers(self.layers):
            check_is_dispensable(cache)
            cache = None
        begin = 0 if cache is None else cache.get_seq_length()
        num_blocks, length = check_blocks(config, begin, scale_inputs)
        known = (begin + 1, 0) if config.is_causal else (1, begin)
        has_gaps = isinstance(cache, VARCache) and bool(cache.layer_hooks)
        if has_gaps and begin > 0 and num_blocks > 1:
            raise ValueError(
                "`scale_inputs` must be those of one scale where `cache` has hooks and is not empty, since these may leave "
                f"out keys, got {num_blocks} scales."
            )
        if cache is not None and not has_gaps and cache.get_mask_sizes(1, 0) != known:
            # One block has no mask, which could hide positions that are not written yet.
            raise ValueError(
                "`cache` must hand out just the tokens it holds, as `VARCache` and `DynamicCache` do, got "
                f"{type(cache).__name__}."
            )
        if labels is not None:
            labels = as_targets(labels, (length,), config.codebook_size)
        return BlockCall(cache, begin, length, num_blocks, labels)

    def _check_batch(self, call: BlockCall, **inputs: Any) -> None:
        """Raise a `ValueError` unless all inputs, labels and the cache are for as many images."""
        check_batch(**inputs, labels=call.labels, cache=cached_batch_size(call.cache))

    def _inputs(
        self, call: BlockCall, condition: torch.Tensor | None, scale_inputs: torch.Tensor | None
    ) -> dict[str, Any]:
        """The tokens of a call as `predict` reads them, and the mask of its blocks: a single one sees all there is."""
        inputs = self.embed(condition, scale_inputs, call.begin, call.length)
        if call.num_blocks > 1:
            inputs["attention_mask"] = block_mask(self.config, inputs["hidden_states"], call.begin, call.length)
        return inputs

    def _end_call(self, call: BlockCall, logits: torch.Tensor) -> VARTransformerOutput:
        """The output, with the loss where there are labels."""
        loss = None
        if call.labels is not None:
            loss = functional.cross_entropy(
                logits.flatten(0, 1), call.labels.flatten(), label_smoothing=self.config.label_smoothing
            )
        return VARTransformerOutput(loss=loss, logits=logits, cache=call.cache)
