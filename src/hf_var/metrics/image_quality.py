# SPDX-License-Identifier: Apache-2.0
"""Quality of reconstructions: PSNR, SSIM, LPIPS and rFID over a validation set."""

from typing import cast

import torch
from torch import nn
from torchmetrics.aggregation import MeanMetric, SumMetric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from .feature_extractors import full_precision, rgb_bytes


# Upper bound of an image's PSNR in decibels, which would be infinite without any error; 8-bit rounding gives about 59.
MAX_PSNR = 100.0


class ReconstructionMetrics(nn.Module):
    """
    Compares images with their reconstructions, in fp32 whatever the training's precision. `psnr` and `ssim` (Wang et
    al. 2004, section 3) are means of each image's own value; the PSNR of the mean error would be lower. SSIM's
    Gaussian window of 11 x 11 pixels shrinks to the largest odd square that fits into smaller images. `lpips` is a
    mean over images as well. `rfid` (Heusel et al. 2017, section 2) compares the features of all images with those of
    all reconstructions, by an extractor that takes images of any size or has `num_features`. Its bias grows as the
    number of images falls: compare values of equal numbers only. In several processes each image belongs to one
    process, and some may have none.
    """

    def __init__(self, lpips: nn.Module | None = None, feature_extractor: nn.Module | None = None):
        super().__init__()
        self.num_images = SumMetric(nan_strategy="disable")
        # Unchecked, so that a NaN in a reconstruction makes the mean NaN instead of being skipped.
        self.psnr, self.ssim = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")
        self.perceptual_loss = lpips
        self.lpips = None if lpips is None else MeanMetric(nan_strategy="disable")
        self.rfid = None
        if feature_extractor is not None:
            # Without `num_features` the constructor tries the extractor on a random image on the CPU.
            if not hasattr(feature_extractor, "num_features"):
                device = next((tensor.device for tensor in feature_extractor.parameters()), torch.device("cpu"))
                blank = torch.zeros(1, 3, 299, 299, dtype=torch.uint8, device=device)
                with torch.no_grad():
                    feature_extractor.num_features = feature_extractor(blank).shape[-1]
            self.rfid = FrechetInceptionDistance(feature_extractor)
            # Set by the first update only, hence missing in a process that has no image.
            self.rfid.orig_dtype = torch.float32

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor, sample: torch.Tensor) -> None:
        """Add images `(batch, channels, height, width)` in `[-1, 1]` and reconstructions, clipped to that."""
        if pixel_values.ndim != 4 or pixel_values.shape != sample.shape:
            raise ValueError(
                "`pixel_values` and `sample` must have the same shape (batch, channels, height, width), got "
                f"{tuple(pixel_values.shape)} and {tuple(sample.shape)}."
            )
        if min(pixel_values.shape[-2:]) < 3:
            raise ValueError(f"`pixel_values` must have at least 3 x 3 pixels, got {tuple(pixel_values.shape[-2:])}.")
        with full_precision(pixel_values.device.type):
            pixel_values, sample = pixel_values.float(), sample.float().clamp(-1, 1)
            self.num_images.update(len(pixel_values))
            self.psnr.update(_psnr(pixel_values, sample))
            self.ssim.update(_ssim(pixel_values, sample))
            if self.lpips is not None and self.perceptual_loss is not None:
                # Repeated where it is one value, so that a smaller batch counts less.
                self.lpips.update(self.perceptual_loss(sample, pixel_values).flatten().expand(len(sample)))
            if self.rfid is not None:
                self.rfid.update(rgb_bytes(pixel_values), real=True)
                self.rfid.update(rgb_bytes(sample), real=False)

    def compute(self) -> dict[str, float]:
        """The metrics over all images of all processes, which must all call it."""
        needed = 1 if self.rfid is None else 2
        # The sum over all processes, so that they raise together instead of waiting for each other.
        number = int(self.num_images.compute())
        if number < needed:
            raise ValueError(f"The metrics need at least {needed} validation image(s), got {number}.")
        metrics = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips, "rfid": self.rfid}
        return {name: metric.compute().item() for name, metric in metrics.items() if metric is not None}


def _psnr(pixel_values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    ratios = peak_signal_noise_ratio(sample, pixel_values, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp(max=MAX_PSNR)  # (batch,)


def _ssim(pixel_values: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    # torchmetrics' window reaches 3.5 standard deviations to each side: 5 pixels for the usual deviation of 1.5.
    radius = min(5, (min(pixel_values.shape[-2:]) - 1) // 2)
    # SSIM is made for values from zero on: its luminance term changes when a constant is added to both images.
    target, preds = (pixel_values + 1) / 2, (sample + 1) / 2
    similarities = structural_similarity_index_measure(
        preds, target, sigma=0.3 * radius, data_range=1.0, reduction="none"
    )
    return cast(torch.Tensor, similarities)  # (batch,)
