# SPDX-License-Identifier: Apache-2.0
"""The cache of a VAR transformer between the blocks of an image, and checks of the caches of all transformers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from .configuration_blocks import BlocksMixin
from .layer_hooks import LayerCall, LayerHook, check_layer_hooks, chosen_keys, gather_tokens, through_hook


logger = logging.get_logger(__name__)


class VARCacheLayer(CacheLayerMixin):
    """
    Keys and values of one layer in a buffer of the full length, allocated once.

    The schedule is known, so nothing grows by concatenation; `update` hands out views of the part written so far, so
    that attention needs no mask.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0
        # Tokens that were read and have no keys here, because of hooks.
        self.num_skipped = 0

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.num_skipped == 0

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
        return self.length + self.num_skipped

    def get_max_length(self) -> int:
        return self.max_length

    def reset(self) -> None:
        self.length = self.num_skipped = 0

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


class DroppingCacheLayer(VARCacheLayer):
    """
    Keys and values of a layer whose hooks drop some of them: no more memory than what is held needs. The order is that of
    the buffers, so that products of the same keys round in the same way.
    """

    def _make_buffer(self, states: torch.Tensor) -> torch.Tensor:
        return _by_token(torch.empty_like(states))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states[:, :, :0], value_states[:, :, :0])
        self.keys, self.values = _joined(self.keys, key_states), _joined(self.values, value_states)
        self.length += key_states.shape[2]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep(self, places: torch.Tensor) -> None:
        """Drop all keys but those at the `places` `(batch, heads, kept)`."""
        self.keys, self.values = (_by_token(gather_tokens(states, places)) for states in (self.keys, self.values))  # pyright: ignore
        self.num_skipped += self.length - places.shape[2]
        self.length = places.shape[2]

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """`(batch, heads, length, head_dim)` with all heads of a token next to each other in memory."""
    return states.transpose(1, 2).contiguous().transpose(1, 2)


def _joined(states: Any, following: torch.Tensor) -> torch.Tensor:
    """Both, one behind the other, in the same order."""
    return torch.cat([states.transpose(1, 2), following.transpose(1, 2)], dim=1).transpose(1, 2)


class CountingCacheLayer(VARCacheLayer):
    """The same for a layer whose tokens see their own block alone: it counts the tokens and keeps nothing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.length += key_states.shape[-2]
        self.is_initialized = True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.get_seq_length()


class VARCache(Cache):
    """
    Keys and values of every layer, and what depends on the condition alone and is computed once: the AdaLN vectors
    and, of a model that reads a text, the keys and values of the text and its mask. Where tokens see their own scale
    alone (`is_causal=False`), the cache counts the tokens and keeps no keys and values of them.

    Later calls write into the same buffers, so gradients reach no further back than one call: to train through several,
    pass transformers' `DynamicCache`.

    Args:
        config ([`VARConfig`] or [`TextVARConfig`]): Configuration of the transformer that fills the cache.
        layer_hooks (`list[LayerHook]`, *optional*):
            Changes of what the layers compute in the calls with this cache, see [`LayerHook`]. The first one is around the
            others.

    Raises:
        `ValueError`: If it is another configuration, or a hook does not fit it.

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

    def __init__(self, config: BlocksMixin, layer_hooks: Sequence[LayerHook] | None = None):
        if not isinstance(config, BlocksMixin):
            raise ValueError(f"`config` must be a `VARConfig` or a `TextVARConfig`, got {type(config).__name__}.")
        self.config, self.layer_hooks = config, check_layer_hooks(layer_hooks, config)
        layer_class = VARCacheLayer if config.is_causal else CountingCacheLayer
        if config.is_causal and any(hook.drops_keys() for hook in self.layer_hooks):
            layer_class = DroppingCacheLayer
        super().__init__(layers=[layer_class(config.length) for _ in range(config.num_hidden_layers)])
        self.modulations: dict[int, torch.Tensor] = {}
        # Keys and values of the text, by layer, and which of its tokens there are.
        self.cross_attention: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.cross_mask: torch.Tensor | None = None
        self.sizes = config.num_hidden_layers, config.length, config.is_causal
        # What hooks know of each layer, by the hook's place and the layer.
        self._hook_states: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._scales = range(0)

    def run_layer(self, layer_idx: int, run: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
        """`run(hidden_states, tokens=None)`, which is a layer, with the hooks around it."""
        if not self.layer_hooks:
            return run(hidden_states)
        begin = self.get_seq_length(layer_idx)
        end = begin + hidden_states.shape[1]
        ends = self.config.block_ends
        self._scales = range(sum(each <= begin for each in ends), sum(each < end for each in ends) + 1)
        for place, hook in reversed(list(enumerate(self.layer_hooks))):
            run = through_hook(hook, self._layer_call(place, layer_idx), run)
        hidden_states = run(hidden_states)
        layer: Any = self.layers[layer_idx]
        number = layer.get_seq_length()
        if number == 0:
            raise ValueError(
                f"`run_layer` must run layer {layer_idx} at the first scale, where it reads the condition."
            )
        if number > end:
            raise ValueError(f"`run_layer` must run layer {layer_idx} once, for each token at most.")
        # Tokens that the layer was not run for count as read.
        layer.num_skipped += end - number
        return hidden_states

    def update_for(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer_idx: int, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`update`, after which hooks drop keys and values for the later scales."""
        found = self.update(key, value, layer_idx)
        layer = self.layers[layer_idx]
        # Nothing comes after the last scale.
        if not isinstance(layer, DroppingCacheLayer) or self._scales.stop == len(self.config.block_ends):
            return found
        for place, hook in enumerate(self.layer_hooks):
            keys, values = layer.keys, layer.values
            kept = chosen_keys(hook, query, keys, values, scaling, self._layer_call(place, layer_idx))  # pyright: ignore
            if kept is not None:
                layer.keep(kept)
        return found

    def _layer_call(self, place: int, layer_idx: int) -> LayerCall:
        state = self._hook_states.setdefault((place, layer_idx), {})
        return LayerCall(self.config, layer_idx, self._scales, state)

    @property
    def batch_size(self) -> int:
        """Images that it is for; -1 before the first call."""
        layers: Any = self.layers
        kept = [*self.modulations.values(), *(layer.keys for layer in layers)]
        return next((states.shape[0] for states in kept if states is not None), -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions; a `ValueError` if hooks have left out keys."""
        if not self.is_croppable:
            raise ValueError("`crop` needs the keys of all tokens, of which hooks have left out some.")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget the image and its condition, keep the buffers."""
        super().reset()
        self.modulations.clear()
        self.cross_attention.clear()
        self.cross_mask = None
        self._hook_states.clear()

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
        """Replace what is known of the condition, and by hooks, by the results of `function`."""
        self.modulations = {layer: function(vectors) for layer, vectors in self.modulations.items()}
        self.cross_attention = {
            layer: (function(keys), function(values)) for layer, (keys, values) in self.cross_attention.items()
        }
        self.cross_mask = None if self.cross_mask is None else function(self.cross_mask)
        for state in self._hook_states.values():
            state.update({name: function(states) for name, states in state.items()})


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


def cached(
    cache: Cache | None, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that the attention `layer` sees: those of its tokens behind those in the cache."""
    if isinstance(cache, VARCache):
        return cache.update_for(query, key, value, layer.layer_idx, layer.scaling)
    return (key, value) if cache is None else cache.update(key, value, layer.layer_idx)


def run_layer(cache: Cache | None, layer_idx: int, run: Callable, hidden_states: torch.Tensor) -> torch.Tensor:
    """`run(hidden_states, tokens=None)`, which is a layer, with the hooks of the cache around it."""
    return cache.run_layer(layer_idx, run, hidden_states) if isinstance(cache, VARCache) else run(hidden_states)


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
    if getattr(cache, "layer_hooks", ()):
        raise ValueError(
            "`cache` must have no `layer_hooks` where layers are checkpointed in training, which computes without a cache."
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
