# SPDX-License-Identifier: Apache-2.0
"""Attention over blocks: the implementations and their masks, one of which skips the masked products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_blocks import BlocksMixin


# Its name for `set_attn_implementation`.
BLOCKWISE_SDPA = "blockwise_sdpa"
# Smaller blocks are merged, with a mask, up to this many tokens: separate calls would cost more than they save.
MIN_SEGMENT_LENGTH = 64


class Segment(NamedTuple):
    """Queries of a call, and the keys that they see: one block without a mask, or several with one."""

    first: int
    last: int
    first_key: int
    last_key: int
    mask: torch.Tensor | None


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    implementation: str | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention of a layer by the implementation that its model was set to, or by another one: `(batch, length, hidden)`
    of `(batch, heads, length, head_dim)`, and its weights where the implementation returns them.
    """
    config = module.config
    name = str(config._attn_implementation) if implementation is None else implementation
    attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    attended, weights = attention_interface(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=config.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return attended.flatten(-2), weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as two matrix products; the only implementation that also returns its weights."""
    scores = query @ key.transpose(-1, -2) * scaling  # (batch, heads, length, key length)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def token_blocks(config: BlocksMixin, device: torch.device) -> torch.Tensor:
    """The block of every token of an image, `(length,)`."""
    positions = torch.arange(config.length, device=device)[:, None]
    return (positions >= torch.tensor(config.block_ends, device=device)).sum(dim=1)


def block_mask(config: BlocksMixin, hidden_states: torch.Tensor, begin: int, length: int):
    """
    A mask for the tokens `begin` to `begin + length`, of which each sees its own block and, in causal models, all
    before; in the form the attention implementation wants.
    """
    device, end = hidden_states.device, begin + length
    blocks = token_blocks(config, device)

    def is_before(batch_idx, head_idx, query_idx, key_idx):
        return blocks[key_idx] <= blocks[query_idx]

    def is_same(batch_idx, head_idx, query_idx, key_idx):
        return blocks[key_idx] == blocks[query_idx]

    implementation = str(config._attn_implementation)  # pyright: ignore[reportAttributeAccessIssue]
    if "flash" in implementation:
        raise ValueError(
            f"The attention implementation {implementation!r} has no mask of blocks, so it runs one block per call "
            "only: use 'sdpa' or 'flex_attention' to train or to prefill a cache."
        )
    # Without attention to earlier blocks, only the keys of this call are there.
    first_key = 0 if config.is_causal else begin
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return make_mask(
        batch_size=hidden_states.shape[0],
        q_length=length,
        kv_length=end - first_key,
        q_offset=begin,
        kv_offset=first_key,
        mask_function=is_before if config.is_causal else is_same,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=hidden_states.dtype,
        config=config,
        device=device,
    )


def blockwise_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Sequence[Segment] | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    torch's attention, one call for each long block over the tokens that it sees: these calls need no mask, for which
    torch has its fastest kernels, and leave out the tokens that it does not see. Of the released schedules, 35 to 38 %
    of all pairs of tokens are left out, and without attention to earlier scales 70 to 75 %. The arguments are those of
    transformers' attention functions.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    attended = []
    for first, last, first_key, last_key, mask in attention_mask:
        keys = slice(first_key, last_key)
        parts = query[:, :, first:last], key[:, :, keys], value[:, :, keys]
        attended.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    return torch.cat(attended, dim=1), None  # (batch, length, heads, head_dim)


def blockwise_mask(config: BlocksMixin, q_length: int, q_offset: int, kv_offset: int, **kwargs) -> list[Segment]:
    """The mask of [`blockwise_sdpa_attention_forward`]; the arguments are those of transformers' mask functions."""
    segments = []
    for first, last, is_masked in _segments(config.block_ends, q_offset, q_offset + q_length):
        first_key = 0 if config.is_causal else first
        sizes = {"q_length": last - first, "q_offset": first, "kv_length": last - first_key, "kv_offset": first_key}
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**kwargs | sizes) if is_masked else None
        keys = first_key - kv_offset, last - kv_offset
        segments.append(Segment(first - q_offset, last - q_offset, *keys, mask))
    return segments


def register_attention() -> None:
    """Make [`blockwise_sdpa_attention_forward`] known to transformers by its name."""
    ALL_ATTENTION_FUNCTIONS.register(BLOCKWISE_SDPA, blockwise_sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKWISE_SDPA, blockwise_mask)


def _segments(block_ends: Sequence[int], begin: int, end: int) -> list[tuple[int, int, bool]]:
    """First token, end, and whether it is several blocks, of the segments that cover the tokens `begin` to `end`."""
    segments: list[tuple[int, int, bool]] = []
    for last in block_ends:
        if last <= begin or last > end:
            continue
        first = segments[-1][1] if segments else begin
        grows = bool(segments) and segments[-1][1] - segments[-1][0] < MIN_SEGMENT_LENGTH
        if grows and last - first < MIN_SEGMENT_LENGTH:
            segments[-1] = (segments[-1][0], last, True)
        else:
            segments.append((first, last, False))
    return segments
