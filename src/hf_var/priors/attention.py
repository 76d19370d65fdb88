# SPDX-License-Identifier: Apache-2.0
"""Block-causal attention: its mask, and an implementation that skips the masked products."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_var import VARConfig


# Its name for `set_attn_implementation`.
BLOCKWISE_SDPA = "blockwise_sdpa"
# Smaller blocks are merged, with a mask, up to this many tokens: separate calls would cost more than they save.
MIN_SEGMENT_LENGTH = 64


def block_mask(config: VARConfig, hidden_states: torch.Tensor, begin: int, length: int):
    """
    A mask for the tokens `begin` to `begin + length`, of which each sees its own block and all before; in the form the
    attention implementation wants.
    """
    device, end = hidden_states.device, begin + length
    lengths = torch.tensor(config.block_lengths, device=device)
    blocks = torch.arange(len(config.block_lengths), device=device)
    blocks = blocks.repeat_interleave(lengths, output_size=config.length)

    def is_visible(batch_idx, head_idx, query_idx, key_idx):
        return blocks[key_idx] <= blocks[query_idx]

    implementation = str(config._attn_implementation)
    if "flash" in implementation:
        raise ValueError(
            f"The attention implementation {implementation!r} has no block-causal mask, so it runs "
            "one block per call only: use 'sdpa' or 'flex_attention' to train or to prefill a cache."
        )
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return make_mask(
        batch_size=hidden_states.shape[0],
        q_length=length,
        kv_length=end,
        q_offset=begin,
        kv_offset=0,
        mask_function=is_visible,
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
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    torch's attention, one call for each long block over the tokens that it sees: these calls need no mask, for which torch
    has its fastest kernels, and leave out the tokens after the block. Of the released schedules, 35 to 38 % of all pairs
    of tokens are left out. The arguments are those of transformers' attention functions.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    begin, config = key.shape[2] - query.shape[2], cast(VARConfig, module.config)
    attended = []
    for first, last, is_masked in _segments(config.block_ends, begin, key.shape[2]):
        mask = attention_mask[:, :, first - begin : last - begin, :last] if is_masked else None
        parts = query[:, :, first - begin : last - begin], key[:, :, :last], value[:, :, :last]
        attended.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
    return torch.cat(attended, dim=1), None  # (batch, length, heads, head_dim)


def check_output_attentions(config: PreTrainedConfig, output_attentions: bool) -> None:
    """Raise a `ValueError` where attention weights are asked of an implementation that does not have them."""
    implementation = config._attn_implementation
    if output_attentions and implementation != "eager":
        raise ValueError(
            f"`output_attentions` needs the attention implementation 'eager', not {implementation!r}: call "
            "`set_attn_implementation('eager')`."
        )


def register_attention() -> None:
    """Make [`blockwise_sdpa_attention_forward`] known to transformers by its name."""
    ALL_ATTENTION_FUNCTIONS.register(BLOCKWISE_SDPA, blockwise_sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKWISE_SDPA, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


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
