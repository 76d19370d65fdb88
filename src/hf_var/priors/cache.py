# SPDX-License-Identifier: Apache-2.0
"""The cache of a VAR transformer between the blocks of an image, and checks of the caches of all transformers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from .configuration_blocks import BlocksMixin


logger = logging.get_logger(__name__)


class VARCacheLayer(CacheLayerMixin):
    """
    Keys and values of one layer in a buffer of the full length, allocated once.

    The schedule is known, so nothing grows by concatenation; `update` hands out views of the part written so far, so
    that attention needs no mask.
    """

    is_croppable = True

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._make_buffer(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _make_buffer(self, states: torch.Tensor) -> torch.Tensor:
        """
        A buffer `(batch, heads, max_length, head_dim)` for `states`, in the order in which projections write. With several
        heads what is handed out is never contiguous then, not even the whole, so that one compiled graph does for all blocks.
        """
        batch_size, num_heads, _, head_dim = states.shape
        width = num_heads * head_dim
        shape = (batch_size, num_heads, self.max_length, head_dim)
        return states.new_empty_strided(shape, (self.max_length * width, head_dim, width, 1))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]  # (batch, heads, length so far, head_dim)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    @property
    def batch_size(self) -> int:
        """Images that the buffers are for; -1 before the first call."""
        return -1 if self.keys is None else self.keys.shape[0]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers counts them with a negative number)."""
        if tokens_to_remove > 0 or self.length + tokens_to_remove < 0:
            raise ValueError(f"`tokens_to_remove` must be from {-self.length} to 0, got {tokens_to_remove}.")
        self.length += tokens_to_remove

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda buffer: buffer[indices])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the buffers by the results of `function`."""
        if self.keys is not None and self.values is not None:
            keys, values = function(self.keys), function(self.values)
            self.keys = self._make_buffer(keys).copy_(keys)
            self.values = self._make_buffer(values).copy_(values)


class CountingCacheLayer(VARCacheLayer):
    """The same for a layer whose tokens see their own block alone: it counts the tokens and keeps nothing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.length += key_states.shape[-2]
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.length


class VARCache(Cache):
    """
    Keys and values of every layer, and what depends on the condition alone and is computed once: the AdaLN vectors
    and, of a model that reads a text, the keys and values of the text and its mask. Where tokens see their own scale
    alone (`is_causal=False`), the cache counts the tokens and keeps no keys and values of them.

    Later calls write into the same buffers, so gradients reach no further back than one call: to train through several,
    pass transformers' `DynamicCache`.

    Args:
        config ([`VARConfig`] or [`TextVARConfig`]): Configuration of the transformer that fills the cache.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import VARCache, VARConfig, VARTransformer

    >>> config = VARConfig(num_labels=10, patch_nums=(1, 2), hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model, cache = VARTransformer(config).eval(), VARCache(config)
    >>> model(torch.tensor([3]), cache=cache).logits.shape
    torch.Size([1, 1, 4096])
    >>> cache.get_seq_length()
    1
    ```
    """

    def __init__(self, config: BlocksMixin):
        if not isinstance(config, BlocksMixin):
            raise ValueError(f"`config` must be a `VARConfig` or a `TextVARConfig`, got {type(config).__name__}.")
        layer_class = VARCacheLayer if config.is_causal else CountingCacheLayer
        super().__init__(layers=[layer_class(config.length) for _ in range(config.num_hidden_layers)])
        self.modulations: dict[int, torch.Tensor] = {}
        # Keys and values of the text, by layer, and which of its tokens there are.
        self.cross_attention: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.cross_mask: torch.Tensor | None = None
        self.sizes = config.num_hidden_layers, config.length, config.is_causal

    @property
    def batch_size(self) -> int:
        """Images that it is for; -1 before the first call."""
        layers: Any = self.layers
        kept = [*self.modulations.values(), *(layer.keys for layer in layers)]
        return next((states.shape[0] for states in kept if states is not None), -1)

    def reset(self) -> None:
        """Forget the image and its condition, keep the buffers."""
        super().reset()
        self.modulations.clear()
        self.cross_attention.clear()
        self.cross_mask = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_condition(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_condition(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_condition(lambda states: states[indices])

    def _map_condition(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace what is known of the condition by the results of `function`."""
        self.modulations = {layer: function(vectors) for layer, vectors in self.modulations.items()}
        self.cross_attention = {
            layer: (function(keys), function(values)) for layer, (keys, values) in self.cross_attention.items()
        }
        self.cross_mask = None if self.cross_mask is None else function(self.cross_mask)


def only_cache(cache: Any, past_key_values: Any, config: PreTrainedConfig) -> Cache | None:
    """The cache, by either of its names, if it is one for a model of `config`; otherwise a `ValueError`."""
    if cache is not None and past_key_values is not None:
        raise ValueError("Pass one of `cache` and `past_key_values`, which are two names of the same, not both.")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            f"`cache` must be a `VARCache` or another `Cache` of transformers, got {type(cache).__name__}."
        )
    has_blocks = isinstance(config, BlocksMixin)
    if isinstance(cache, VARCache):
        if not has_blocks:
            raise ValueError("`cache` must be a `DynamicCache` or another `Cache` of transformers, got VARCache.")
        sizes = config.num_hidden_layers, config.length, config.is_causal
        if cache.sizes != sizes:
            kinds = [" with is_causal=False" * (not is_causal) for *_, is_causal in (sizes, cache.sizes)]
            raise ValueError(
                f"`cache` must be for {config.num_hidden_layers} layers and {config.length} tokens{kinds[0]}, as "
                f"`VARCache(model.config)`, got one for {cache.sizes[0]} and {cache.sizes[1]}{kinds[1]}."
            )
    elif cache is not None and has_blocks and not config.is_causal:
        raise ValueError(
            "`cache` must be a `VARCache` for a model with is_causal=False, which keeps no keys and values, "
            f"got {type(cache).__name__}."
        )
    return cache


def checkpoints_layers(layers: nn.ModuleList) -> bool:
    """Whether the backward pass will run any of `layers` a second time."""
    return torch.is_grad_enabled() and any(
        getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
    )


def check_is_dispensable(cache: Cache) -> None:
    """
    Whether a call with checkpointed layers can do without `cache`: the backward pass would write its blocks a second time.
    transformers drops a cache as well, but layer by layer, and by a name that changes from release to release.
    """
    if num_tokens := cache.get_seq_length():
        raise ValueError(
            f"`cache` must be empty where layers are checkpointed in training, got one with {num_tokens} tokens, which "
            "these layers cannot read: pass all blocks in one call, or turn off checkpointing or gradients."
        )
    logger.warning_once("Caching is incompatible with activation checkpointing: `cache` is ignored and stays empty.")


def cached_batch_size(cache: Cache | None) -> int | None:
    """Images that a cache is for, `None` before its first call."""
    if isinstance(cache, VARCache):
        return None if cache.batch_size < 0 else cache.batch_size
    # Layers of a `DynamicCache` do not say it.
    keys = getattr(cache.layers[0], "keys", None) if cache is not None and cache.layers else None
    return keys.shape[0] if keys is not None and keys.ndim == 4 else None


__all__ = ["VARCache"]
