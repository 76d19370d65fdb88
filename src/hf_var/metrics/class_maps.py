# SPDX-License-Identifier: Apache-2.0
"""Quality of reconstructed class maps, such as segmentations: accuracy of pixels and mean IoU; and their colours."""

import torch
from torch import nn
from torchmetrics.aggregation import SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ..autoencoders.class_maps import as_class_ids


# Ids beyond begin with the first colour again.
NUM_COLORS = 256


class ClassMapMetrics(nn.Module):
    """
    Compares class maps with their reconstructions. `pixel_accuracy` is the share of pixels whose class is the
    reconstruction's likeliest one; `mean_iou` the mean over classes of intersection over union of their pixels in all
    maps (Everingham et al. 2010, section 4.3), without classes that neither maps nor reconstructions have. In several
    processes each map belongs to one process, and some may have none.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_maps = SumMetric(nan_strategy="disable")
        # Checking the values would wait for the device.
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.mean_iou = MulticlassJaccardIndex(num_classes, average="macro", validate_args=False)

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor, sample: torch.Tensor) -> None:
        """Add class maps, ids `(batch, height, width)` or one-hot, and logits `(batch, classes, height, width)`."""
        target, predicted = as_class_ids(pixel_values), as_class_ids(sample)
        self.num_maps.update(len(target))
        self.accuracy.update(predicted, target)
        self.mean_iou.update(predicted, target)

    def compute(self) -> dict[str, float]:
        """The metrics over all maps of all processes, which must all call it."""
        # The sum over all processes, so that they raise together instead of waiting for each other.
        number = int(self.num_maps.compute())
        if number < 1:
            raise ValueError(f"The metrics need at least 1 validation image(s), got {number}.")
        return {"pixel_accuracy": self.accuracy.compute().item(), "mean_iou": self.mean_iou.compute().item()}


def class_colors(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Class maps in either form, or logits, as images `(batch, 3, height, width)` in `[-1, 1]`, in the colours of the
    PASCAL VOC challenge: the three bits of each octal digit of an id are bits of red, green and blue, the lowest
    digit's the highest.
    """
    ids = as_class_ids(pixel_values) % NUM_COLORS
    colors = torch.zeros(len(ids), 3, *ids.shape[1:], dtype=torch.long, device=ids.device)
    for bit in range(8):
        digits = (ids >> (3 * bit)) & 7
        for channel in range(3):
            colors[:, channel] |= ((digits >> channel) & 1) << (7 - bit)
    return colors / 127.5 - 1
