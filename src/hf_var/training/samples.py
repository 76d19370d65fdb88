# SPDX-License-Identifier: Apache-2.0
"""Samples of the prior that is trained, and the sampling defaults of the pipeline that is saved."""

from dataclasses import dataclass

from ..ranges import CheckedFields, NonNegativeFloat, NonNegativeInt, Share, argument


# Arguments that become defaults of the pipeline.
SAMPLING = ("guidance_scale", "top_p", "temperature")


@dataclass(kw_only=True)
class SampleConfig(CheckedFields):
    """Samples during the training, and the sampling defaults of the pipeline that is saved."""

    sample_steps: NonNegativeInt = argument(0, help="sample this often; 0: at the end only")
    num_samples: NonNegativeInt = argument(16, help="images in the picture of samples; 0: no picture")
    guidance_scale: NonNegativeFloat | None = argument(
        None, help="default of the pipeline that is saved: 1 is off; by default that of the pipeline's class"
    )
    top_p: Share | None = argument(None, help="the same: 1 is off")
    temperature: NonNegativeFloat | None = argument(None, help="the same")

    @property
    def defaults(self) -> dict[str, float]:
        """The defaults that are given."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}


def spread_labels(num_labels: int, number: int) -> list[int | None]:
    """Labels of `number` samples, from the first class to the last; `None` without classes."""
    return [index * num_labels // number if num_labels > 0 else None for index in range(number)]
