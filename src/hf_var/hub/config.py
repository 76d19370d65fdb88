# SPDX-License-Identifier: Apache-2.0
"""Whether and how the result of a training is published."""

from dataclasses import dataclass

from ..ranges import CheckedFields, NonNegativeInt, argument


@dataclass(kw_only=True)
class HubConfig(CheckedFields):
    """The repository of a result, and its licence."""

    push_to_hub: bool = argument(False, help="upload the result")
    hub_model_id: str | None = argument(None, help="default: the name of output_dir")
    license: str | None = argument(None, help="licence of the weights, for the model card")


@dataclass(kw_only=True)
class PipelineHubConfig(HubConfig):
    """The same for a pipeline, which may be uploaded while it is trained."""

    push_steps: NonNegativeInt = argument(
        0, help="upload the pipeline this often, in the background; 0: at the end only"
    )
    data_license: str | None = argument(None, help="licence of the data, for the model card")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_steps > 0 and not self.push_to_hub:
            raise ValueError(f"`push_steps` = {self.push_steps} needs `push_to_hub`.")
