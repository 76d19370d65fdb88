# SPDX-License-Identifier: Apache-2.0
"""The gated PixelCNN: p(codes | class) by masked convolutions."""

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .causal_layers import MaskedConv2d
from .configuration_pixelcnn import PixelCNNConfig
from .modeling_pixel_prior import PixelPrior
from .row_cache import RowCache


class PixelCNNLayer(GradientCheckpointingLayer):
    """
    A gated layer of two stacks (van den Oord et al. 2016, figure 2): the vertical one sees the rows above, the horizontal
    one the codes to the left and, through the vertical one, the rows above.
    """

    def __init__(self, config: PixelCNNConfig, layer_idx: int):
        super().__init__()
        # Only the first layer reads codes, its own row and place hidden; all others read what may be known there.
        self.is_first = layer_idx == 0
        size = config.first_kernel_size if self.is_first else config.kernel_size
        width, reach = config.hidden_size, size // 2
        num_masked = (size, 1) if self.is_first else (0, 0)
        self.vertical_conv = MaskedConv2d(
            width, 2 * width, (reach + 1, size), (reach, reach, reach, 0), num_masked=num_masked[0]
        )
        self.horizontal_conv = MaskedConv2d(
            width, 2 * width, (1, reach + 1), (reach, 0, 0, 0), num_masked=num_masked[1]
        )
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal_proj = nn.Conv2d(width, width, 1)
        num_classes = config.num_class_embeddings
        self.class_embedding = nn.Embedding(num_classes, 2 * width) if num_classes else None

    def forward(
        self,
        vertical: torch.Tensor,
        horizontal: torch.Tensor,
        class_labels: torch.Tensor | None,
        cache: RowCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        above = self.vertical_conv(vertical, cache)
        left = self.vertical_to_horizontal(above) + self.horizontal_conv(horizontal, cache)
        if self.class_embedding is not None:
            shift = self.class_embedding(class_labels)[:, :, None, None]
            above, left = above + shift, left + shift
        output = self.horizontal_proj(gate(left))
        # Of the layers' stacks (batch, channels, rows, width) the vertical one has no residual connection.
        return gate(above), output if self.is_first else output + horizontal


def gate(states: torch.Tensor) -> torch.Tensor:
    """Half of the channels, the tanh of one half times the sigmoid of the other."""
    values, gates = states.chunk(2, dim=1)
    return torch.tanh(values) * torch.sigmoid(gates)


class PixelCNN(PixelPrior):
    r"""
    Gated PixelCNN (van den Oord et al. 2016) over a map of codes, as the prior of a VQ-VAE: convolutions alone, on two
    stacks that together see all earlier codes within their reach.

    Args:
        config ([`PixelCNNConfig`]): Sizes.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import PixelCNN, PixelCNNConfig

    >>> config = PixelCNNConfig(num_labels=10, map_size=4, codebook_size=32, hidden_size=16, num_hidden_layers=3)
    >>> model = PixelCNN(config)
    >>> codes = torch.randint(0, 32, (2, config.length))
    >>> output = model(codes, torch.tensor([3, 1]), labels=codes)
    >>> output.logits.shape
    torch.Size([2, 16, 32])
    ```
    """

    config: PixelCNNConfig
    config_class = PixelCNNConfig
    base_model_prefix = "pixelcnn"
    _input_embed_layer = "embedding"
    _no_split_modules = ["PixelCNNLayer"]

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        self.layers = nn.ModuleList(PixelCNNLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.head_proj = nn.Conv2d(config.hidden_size, config.head_hidden_size, 1)
        self.head = nn.Conv2d(config.head_hidden_size, config.codebook_size, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, MaskedConv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def embed_condition(
        self, class_labels: torch.Tensor | None, condition_codes: torch.Tensor | None
    ) -> torch.Tensor | None:
        if condition_codes is not None:
            raise ValueError(
                "`condition_codes` must be None: a PixelCNN has no coarser map, which a PixelSNAIL may have."
            )
        return class_labels

    def predict(
        self, rows: torch.Tensor, condition: torch.Tensor | None, begin: int, cache: RowCache | None = None
    ) -> torch.Tensor:
        vertical = horizontal = self.embedding(rows).permute(0, 3, 1, 2)  # (batch, hidden, rows, width)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal, condition, cache=cache)
        return self.head(functional.relu(self.head_proj(horizontal)))


__all__ = ["PixelCNN"]
