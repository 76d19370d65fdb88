# SPDX-License-Identifier: Apache-2.0
"""Stacks: all codes of a position, one for each depth."""

import torch

from ..tensor_checks import as_indices, check_floats, check_range
from .configuration_rq import RQTransformerConfig


def stack_codes(codes: torch.Tensor, depth: int) -> torch.Tensor:
    """
    The codes of a tokenizer, one depth after the other, as stacks.

    Args:
        codes (`torch.Tensor` of shape `(batch, depth * positions, ...)`): Codes, or their vectors.
        depth (`int`): Codes of a position.

    Returns:
        `torch.Tensor` of shape `(batch, positions, depth, ...)`, a view.

    Raises:
        `ValueError`: If the codes are not whole stacks.
    """
    if codes.ndim < 2 or codes.shape[1] % depth:
        raise ValueError(
            f"`codes` must have the shape (batch, {depth} * positions) for stacks of {depth}, got {tuple(codes.shape)}."
        )
    return codes.unflatten(1, (depth, -1)).transpose(1, 2)


def unstack_codes(stacks: torch.Tensor) -> torch.Tensor:
    """The inverse of [`stack_codes`]: `(batch, depth * positions, ...)` of `(batch, positions, depth, ...)`."""
    return stacks.transpose(1, 2).flatten(1, 2)


def check_stacks(
    config: RQTransformerConfig,
    codes: torch.Tensor | None,
    code_vectors: torch.Tensor | None,
    of_one_position: bool = False,
) -> torch.Tensor | None:
    """The codes or code vectors, whichever the model reads, of several positions or the first depths of one."""
    reads_vectors = config.code_inputs == "vectors"
    stacks, other = (code_vectors, codes) if reads_vectors else (codes, code_vectors)
    name, wrong = ("code_vectors", "codes") if reads_vectors else ("codes", "code_vectors")
    if other is not None:
        raise ValueError(f"`{name}` must be passed to a model with code_inputs={config.code_inputs!r}, got `{wrong}`.")
    if stacks is None:
        return None
    if reads_vectors:
        check_floats(name, stacks)
    else:
        stacks = as_indices(name, stacks)
    shape = ("batch", "depths") if of_one_position else ("batch", "positions", config.depth)
    shape += (config.latent_channels,) if reads_vectors else ()
    fits = len(shape) == stacks.ndim and stacks.shape[1] > 0
    if not fits or any(
        found != size for found, size in zip(stacks.shape, shape, strict=True) if isinstance(size, int)
    ):
        raise ValueError(f"`{name}` must have the shape ({', '.join(map(str, shape))}), got {tuple(stacks.shape)}.")
    if not reads_vectors:
        check_range("codes", stacks, 0, config.codebook_size - 1, f"in [0, {config.codebook_size})")
    return stacks


__all__ = ["stack_codes", "unstack_codes"]
