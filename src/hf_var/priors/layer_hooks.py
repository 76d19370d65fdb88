# SPDX-License-Identifier: Apache-2.0
"""What may be changed in the layers of a VAR transformer while it samples: the tokens they run for, the keys they keep."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .configuration_blocks import BlocksMixin


class LayerRun(Protocol):
    """
    The layer itself: hidden states of tokens, before and after. `tokens` `(batch, number)` are their places in the call if
    these are not all tokens of it.
    """

    def __call__(self, hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor: ...


class LayerCall(NamedTuple):
    """
    What a hook is told of a layer at work.

    Args:
        config ([`VARConfig`] or [`TextVARConfig`]): Configuration of the transformer.
        layer_idx (`int`): The layer, from 0 on.
        scales (`range`): The scales that the call reads: one, unless several are known in advance, as for variations.
        state (`dict[str, torch.Tensor]`):
            What the hook itself keeps of this layer between the scales of an image: tensors whose first dimension is the
            batch, guided halves one behind the other. It ends with the call of the pipeline.
    """

    config: BlocksMixin
    layer_idx: int
    scales: range
    state: dict[str, torch.Tensor]


class LayerHook:
    """
    Changes what the layers of a VAR transformer compute at each scale. A subclass overrides [`~LayerHook.run_layer`],
    [`~LayerHook.keep_keys`] or both; pipelines take it as `layer_hooks`, the transformer in a [`VARCache`].

    A hook has settings alone. What it knows of an image is in `call.state`, so that one object serves any number of calls
    and threads. It is meant for transformers that are not compiled; `output_hidden_states` records what layers return before
    the hooks.

    Example:

    ```python
    >>> from hf_var import DIGITS_CHECKPOINT, LayerHook, VARPipeline

    >>> class SkippedLayer(LayerHook):
    ...     def __init__(self, layer_idx):
    ...         self.layer_idx = layer_idx
    ...
    ...     def run_layer(self, run, hidden_states, call):
    ...         is_skipped = call.layer_idx == self.layer_idx and call.scales.stop == len(call.config.patch_nums)
    ...         return hidden_states if is_skipped else run(hidden_states)

    >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    >>> images = pipe(3, layer_hooks=[SkippedLayer(2)]).images
    ```
    """

    def check(self, config: BlocksMixin) -> None:
        """
        Raise a `ValueError` unless the hook fits a model, before anything is computed.

        Args:
            config ([`VARConfig`] or [`TextVARConfig`]): Configuration of the transformer.
        """

    def run_layer(self, run: LayerRun, hidden_states: torch.Tensor, call: LayerCall) -> torch.Tensor:
        r"""
        Run a layer.

        Args:
            run (`Callable`):
                The layer, to be called once at most. It takes the hidden states of all tokens of the call, or, if that has
                one scale, of some of them, and then, as `tokens` of shape `(batch, number)`, which ones. Tokens for which
                it is not run have no keys and values in this layer. At the first scale it must be called.
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): The tokens of the call.
            call ([`LayerCall`]): The layer, the scales and the hook's own state.

        Returns:
            `torch.Tensor` of shape `(batch, length, hidden_size)`.
        """
        return run(hidden_states)

    def keep_keys(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, call: LayerCall
    ) -> torch.Tensor | None:
        r"""
        Choose the keys and values that later scales see. It is asked after each scale but the last one, of models whose
        scales see the earlier ones.

        Args:
            query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): Queries of the call.
            key (`torch.Tensor` of shape `(batch, heads, number, head_dim)`):
                All keys that there are, those of the call last.
            value (`torch.Tensor` of shape `(batch, heads, number, head_dim)`): The values to them.
            scaling (`float`): Factor on the products of queries and keys, before the softmax.
            call ([`LayerCall`]): The layer, the scales and the hook's own state.

        Returns:
            `torch.LongTensor` of shape `(batch, heads, kept)`: Places of the keys that are kept, or `None` for all.
        """
        return None

    @classmethod
    def drops_keys(cls) -> bool:
        """Whether the class chooses keys at all; those of other hooks lie in one buffer for the whole image."""
        return cls.keep_keys is not LayerHook.keep_keys


def check_layer_hooks(hooks: Any, config: BlocksMixin) -> tuple[LayerHook, ...]:
    """The hooks of a call; a `ValueError` unless all are some and fit a model of `config`."""
    if hooks is None:
        return ()
    if isinstance(hooks, (str, LayerHook)) or not isinstance(hooks, Sequence):
        raise ValueError(f"`layer_hooks` must be a list of `LayerHook`s, got {hooks!r}.")
    for hook in hooks:
        if not isinstance(hook, LayerHook):
            raise ValueError(f"`layer_hooks` must be a list of `LayerHook`s, got {hook!r} in it.")
        if config.block_lengths != config.scale_lengths:
            raise ValueError("`layer_hooks` need a model that predicts whole scales, got one with `block_sizes`.")
        hook.check(config)
    return tuple(hooks)


def through_hook(hook: LayerHook, call: LayerCall, run: LayerRun) -> LayerRun:
    """`run` with a hook around it."""

    def run_hooked(hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        given, outer = hidden_states, tokens

        def run_some(hidden_states: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
            _check_tokens(tokens, hidden_states, given, call)
            if outer is not None:
                # Another hook around this one has chosen before.
                tokens = outer if tokens is None else outer.gather(1, tokens)
            return run(hidden_states, tokens)

        found = hook.run_layer(run_some, hidden_states, call)
        if not isinstance(found, torch.Tensor) or found.shape != hidden_states.shape:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"`run_layer` must return the shape {tuple(hidden_states.shape)}, got {got}.")
        return found

    return run_hooked


def _check_tokens(
    tokens: torch.Tensor | None, hidden_states: torch.Tensor, given: torch.Tensor, call: LayerCall
) -> None:
    """Raise a `ValueError` unless `tokens` says which of the `given` ones a layer is run for."""
    if tokens is None:
        if hidden_states.shape != given.shape:
            raise ValueError(
                f"`hidden_states` must have the shape {tuple(given.shape)} without `tokens`, got "
                f"{tuple(hidden_states.shape)}."
            )
        return
    if len(call.scales) > 1:
        raise ValueError(
            f"`tokens` must be left out where a call reads several scales, got some in one of {len(call.scales)}."
        )
    if tokens.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"`tokens` must have the shape {tuple(hidden_states.shape[:2])}, one for each of the hidden states, got "
            f"{tuple(tokens.shape)}."
        )


def chosen_keys(
    hook: LayerHook, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, call: LayerCall
) -> torch.Tensor | None:
    """What a hook keeps of the keys; a `ValueError` unless these are some for each head."""
    places = hook.keep_keys(query, key, value, scaling, call)
    if places is None:
        return None
    heads = tuple(key.shape[:2])
    is_some = isinstance(places, torch.Tensor) and places.dtype == torch.long and places.ndim == 3
    if not is_some or places.shape[:2] != heads or places.shape[2] == 0:
        got = f"{places.dtype} {tuple(places.shape)}" if isinstance(places, torch.Tensor) else type(places).__name__
        raise ValueError(f"`keep_keys` must return int64 of the shape ({heads[0]}, {heads[1]}, kept), got {got}.")
    return places


def gather_tokens(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The vectors `(batch, ..., number, channels)` at the places `tokens` `(batch, ..., number)`."""
    return states.gather(-2, tokens.unsqueeze(-1).expand(*tokens.shape, states.shape[-1]))


__all__ = ["LayerCall", "LayerHook"]
