# SPDX-License-Identifier: Apache-2.0
"""
A Ray cluster, and work in its processes. Ray Data replaces workers that die and repeats their tasks, without a limit. Results
come back to this process, which alone writes files: a worker that is thought lost cannot write into the file of its successor.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, cast

import pyarrow
import ray  # pyright: ignore[reportMissingImports]
import ray.data  # pyright: ignore[reportMissingImports]
import torch


# Of each task.
BATCHES: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}


@contextmanager
def cluster() -> Iterator[None]:
    """The cluster that this process is connected to, or else the one that RAY_ADDRESS names, or else a new local one."""
    is_connected = ray.is_initialized()
    if not is_connected:
        ray.init()
    try:
        yield
    finally:
        if not is_connected:
            ray.shutdown()


def actor_device() -> torch.device:
    """The kind of device that the actors of the cluster work on."""
    return torch.device("cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")


def run_in_actors(
    items: Sequence[dict[str, Any]],
    actor: type,
    arguments: dict[str, Any],
    number: int,
    before: Callable[[pyarrow.Table], Iterator[pyarrow.Table]] | None = None,
) -> Generator[pyarrow.Table]:
    """
    What `number` actors, `actor(**arguments)`, make of tables with one of the `items` each, in any order. Tasks on all CPUs
    may prepare the tables `before`.
    """
    dataset = ray.data.from_items(list(items), override_num_blocks=len(items))
    # That of this data set alone; the progress that counts is that of the images.
    dataset.context.enable_progress_bars = False
    if before is not None:
        dataset = dataset.map_batches(before, **BATCHES)
    dataset = dataset.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        compute=ray.data.ActorPoolStrategy(size=number),
        num_gpus=int(actor_device().type == "cuda"),
        # Not counted, so that tasks and actors never wait for each other's CPUs.
        num_cpus=0,
        **BATCHES,
    )
    tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    with closing(cast(Any, iter(tables))) as results:
        yield from results
