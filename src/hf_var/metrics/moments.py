# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features, summed up batch by batch, and the distance of two of them: FID and its kin."""

import numpy as np
import torch


class GaussianStatistics:
    """
    Mean and covariance of features that come in batches, in fp64. Batches are merged by their own moments (Chan et al.
    1979), not by sums of squares, whose difference has no digits left where the mean is large.

    The numbers stay on the device of the first batch.

    Example:

    ```python
    >>> import torch
    >>> from hf_var.metrics.moments import GaussianStatistics, frechet_distance

    >>> statistics, shifted = GaussianStatistics(), GaussianStatistics()
    >>> for features in torch.randn(4, 50, 8):
    ...     statistics.update(features)
    ...     shifted.update(features + 1)
    >>> round(frechet_distance(statistics, shifted), 4)
    8.0
    ```
    """

    def __init__(self) -> None:
        self.num_images: int | None = 0
        """Number of images; `None` where the statistics were stored without it."""
        self._mean = torch.zeros(0, dtype=torch.float64)  # (features,)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # (features, features): covariance times (images - 1)

    @classmethod
    def from_arrays(cls, mu: np.ndarray, sigma: np.ndarray) -> "GaussianStatistics":
        """
        Statistics that were computed elsewhere, such as those in reference files; nothing can be added to them.

        Args:
            mu (`np.ndarray` of shape `(features,)`): Means.
            sigma (`np.ndarray` of shape `(features, features)`): Covariances.

        Raises:
            `ValueError`: If the shapes do not fit, if `sigma` is not symmetric, or if values are not finite.
        """
        mean = torch.from_numpy(np.array(mu, dtype=np.float64))
        covariance = torch.from_numpy(np.array(sigma, dtype=np.float64))
        if mean.ndim != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                "`mu` and `sigma` must have the shapes (features,) and (features, features), got "
                f"{tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        for name, values in (("mu", mean), ("sigma", covariance)):
            if not values.isfinite().all():
                raise ValueError(f"`{name}` must be finite, got values that are not.")
        difference = (covariance - covariance.T).abs().max().item()
        if difference > 1e-5 * covariance.abs().max().item():
            raise ValueError(f"`sigma` must be symmetric, got values that differ by up to {difference:g}.")
        statistics = cls()
        statistics.num_images, statistics._mean, statistics._scatter = None, mean, (covariance + covariance.T) / 2
        return statistics

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """
        Add images.

        Args:
            features (`torch.FloatTensor` of shape `(batch, features)`): Their features.

        Raises:
            `ValueError`: If the shape is another one or has other features than before, if values are not finite, or if
                the statistics were stored.
        """
        if self.num_images is None:
            raise ValueError("Images cannot be added to stored statistics, whose number of images is unknown.")
        check_features("features", features)
        features = in_double(features)
        if self.num_images == 0:
            self._mean = torch.zeros_like(features[0])
            self._scatter = torch.zeros_like(torch.outer(self._mean, self._mean))
        if features.shape[1] != len(self._mean):
            raise ValueError(f"`features` must be {len(self._mean)} per image as before, got {features.shape[1]}.")
        features = features.to(self._mean.device)
        number = self.num_images + len(features)
        mean = features.mean(dim=0)
        deviations, step = features - mean, mean - self._mean
        self._scatter += deviations.T @ deviations
        self._scatter += torch.outer(step, step) * (self.num_images * len(features) / number)
        self._mean += step * (len(features) / number)
        self.num_images = number

    @property
    def mean(self) -> torch.Tensor:
        """
        Means `(features,)`.

        Raises:
            `ValueError`: If there was no image.
        """
        if self.num_images == 0:
            raise ValueError("A mean needs at least 1 image, got 0.")
        return self._mean.clone()

    @property
    def covariance(self) -> torch.Tensor:
        """
        Covariances `(features, features)`, unbiased: divided by the number of images less one.

        Raises:
            `ValueError`: If there were fewer than 2 images.
        """
        if self.num_images is None:
            return self._scatter.clone()
        if self.num_images < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {self.num_images}.")
        return self._scatter / (self.num_images - 1)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    r"""
    Distance of two Gaussians (Heusel et al. 2017, section 2): \( \|\mu_1 - \mu_2\|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 -
    2 (\Sigma_1 \Sigma_2)^{1/2}) \), FID on Inception's pool features and sFID on its spatial ones.

    The trace of the root is a sum over the eigenvalues of the symmetric \( \Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2} \),
    hence covariances of fewer images than features, which are singular, need no amendment.

    Args:
        first ([`GaussianStatistics`]): Statistics of one set of images.
        second ([`GaussianStatistics`]): Statistics of another, by the same extractor.

    Raises:
        `ValueError`: If the numbers of features differ, or if one has fewer than 2 images.
    """
    mean, covariance = first.mean, first.covariance
    other_mean, other_covariance = second.mean.to(mean.device), second.covariance.to(mean.device)
    if len(mean) != len(other_mean):
        raise ValueError(
            f"`first` and `second` must have as many features as each other, got {len(mean)} and {len(other_mean)}: they "
            "come from different extractors."
        )
    values, vectors = torch.linalg.eigh(covariance)
    # Eigenvalues that should be zero are negative half of the time.
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    roots = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt()
    traces = covariance.trace() + other_covariance.trace()
    distance = (mean - other_mean).square().sum() + traces - 2 * roots.sum()
    return max(distance.item(), 0.0)


def check_features(name: str, features: torch.Tensor) -> None:
    """
    Raises:
        `ValueError`: If `features`, named `name`, are not finite numbers `(images, features)` of at least one image.
    """
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating point numbers (images, features), got "
            f"{tuple(features.shape)} of {str(features.dtype).removeprefix('torch.')}."
        )
    if not features.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got values that are not.")


def in_double(values: torch.Tensor) -> torch.Tensor:
    """`values` in fp64, on the CPU if they are on one of Apple's graphics processors, which have none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
