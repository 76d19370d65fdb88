# SPDX-License-Identifier: Apache-2.0
"""Who works on a large set of images: the processes of Accelerate, or the workers of a Ray cluster."""

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated

from ..ranges import CheckedFields, OneOf, PositiveInt, argument


# Arguments that change nothing of the result.
ENGINE_SETTINGS = frozenset({"engine", "ray_actors"})


@dataclass(kw_only=True)
class EngineConfig(CheckedFields):
    """The choice of the engine."""

    engine: Annotated[str, OneOf("accelerate", "ray")] = argument(
        "accelerate", help="accelerate: its processes; ray: workers of a cluster, which replaces those that die"
    )
    ray_actors: PositiveInt = argument(
        1, help="of the engine ray: workers with the model, with a GPU each if there are any"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.engine != "ray" and self.ray_actors != 1:
            raise ValueError(f"`ray_actors` = {self.ray_actors} needs `engine` = 'ray', got {self.engine!r}.")


def load_cluster(num_processes: int) -> ModuleType:
    """The module of Ray's cluster; a `ValueError` if the engine "ray" cannot run."""
    if num_processes > 1:
        raise ValueError(
            f"`engine` = 'ray' must be started as one process, which starts its workers itself: see `ray_actors`. Got "
            f"{num_processes} processes."
        )
    # It comes with an extra.
    try:
        from . import ray_cluster
    except ModuleNotFoundError as error:
        raise ValueError(f"`engine` = 'ray' needs `pip install hf_var[ray]`: {error}.") from error
    return ray_cluster
