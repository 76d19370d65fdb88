# SPDX-License-Identifier: Apache-2.0
"""Maps of classes in both forms: ids, which are small, and one-hot over the channels, which networks read."""

import torch


def one_hot(class_ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Maps of ids `(batch, height, width)` as `(batch, num_classes, height, width)` floats, 0 and 1."""
    batch_size, height, width = class_ids.shape
    pixel_values = torch.zeros(batch_size, num_classes, height, width, device=class_ids.device)
    # torch's own `one_hot` has the classes last, and 8 bytes for each.
    return pixel_values.scatter_(1, class_ids.long().unsqueeze(1), 1.0)


def as_one_hot(pixel_values: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The same for maps in either form."""
    return pixel_values if pixel_values.is_floating_point() else one_hot(pixel_values, num_classes)


def as_class_ids(pixel_values: torch.Tensor) -> torch.Tensor:
    """Maps in either form, or logits of the classes, as ids, int64 `(batch, height, width)`."""
    return pixel_values.argmax(dim=1) if pixel_values.is_floating_point() else pixel_values.long()
