# SPDX-License-Identifier: Apache-2.0
"""The cache of a convolutional prior between the rows of a map."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class RowCache:
    """
    What the layers of a [`PixelCNN`] or [`PixelSNAIL`] need of the rows of codes that are finished, and what depends on
    the condition alone.

    A call with a cache computes rows that follow the finished ones. It may be repeated while these rows are filled code by
    code. After a last call with all their codes `finish_rows` makes them finished. Only as many rows of each layer's input
    are kept as its convolution reaches back, and the keys and values of attention. Weights are masked and normalised once.

    Attributes:
        num_rows (`int`): Finished rows.
        condition (`torch.Tensor`, *optional*): The condition, computed at the first call.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import PixelCNN, PixelCNNConfig, RowCache

    >>> config = PixelCNNConfig(map_size=2, codebook_size=16, hidden_size=8, num_hidden_layers=2)
    >>> model, cache = PixelCNN(config).eval(), RowCache()
    >>> codes = torch.zeros(1, 2, 2, dtype=torch.long)
    >>> for row in range(2):
    ...     for column in range(2):
    ...         logits = model(codes[:, row], cache=cache).logits  # (batch, codes of the row, codebook_size)
    ...         codes[:, row, column] = logits[:, column].argmax(-1)
    ...     _ = model(codes[:, row], cache=cache)  # with its last code, too
    ...     cache.finish_rows()
    >>> cache.num_rows
    2
    ```
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget the map and its condition."""
        self.num_rows = 0
        self.condition: torch.Tensor | None = None
        self._finished: dict[nn.Module, torch.Tensor] = {}
        self._latest: dict[nn.Module, torch.Tensor] = {}
        self._weights: dict[nn.Module, torch.Tensor] = {}
        self._num_latest_rows = 0

    @property
    def batch_size(self) -> int:
        """Maps that the cache is for; -1 before the first call."""
        return next((len(states) for states in self._latest.values()), -1)

    def begin_rows(self, num_rows: int) -> None:
        """Announce a call over `num_rows` rows after the finished ones, in place of those of the last call."""
        self._num_latest_rows = num_rows

    def finish_rows(self) -> None:
        """
        Make the rows of the last call finished, with the codes that it had: the next call is about those that follow.

        Raises:
            `ValueError`: If there was no call since the last finished row.
        """
        if self._num_latest_rows == 0:
            raise ValueError("`finish_rows` needs a call of the model with this cache since the last finished row.")
        self.num_rows += self._num_latest_rows
        self._num_latest_rows = 0
        # A copy, which does not keep the whole tensor of that call alive.
        self._finished = {layer: states.clone() for layer, states in self._latest.items()}

    def extend(self, layer: nn.Module, states: torch.Tensor, num_kept: int | None = None) -> torch.Tensor:
        """
        The states `(batch, channels, rows, width)` of this call with those of finished rows before them: the last
        `num_kept` rows, zeros above the map, or all of them.
        """
        finished = self._finished.get(layer)
        if finished is not None:
            states = torch.cat([finished, states], dim=2)
        elif num_kept is not None:
            states = functional.pad(states, (0, 0, num_kept, 0))
        self._latest[layer] = states if num_kept is None else states[:, :, states.shape[2] - num_kept :]
        return states

    def keep(self, layer: nn.Module, make_weight: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The weight of a layer, made at its first call: for a row or two, making it costs more than using it."""
        if layer not in self._weights:
            self._weights[layer] = make_weight()
        return self._weights[layer]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the maps `indices` of the batch, for instance those with a class, in their order."""
        self._map(lambda states: states[indices.to(states.device)])

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.condition = None if self.condition is None else function(self.condition)
        for stored in (self._finished, self._latest):
            stored.update({layer: function(states) for layer, states in stored.items()})


__all__ = ["RowCache"]
