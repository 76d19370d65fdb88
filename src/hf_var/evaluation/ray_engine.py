# SPDX-License-Identifier: Apache-2.0
"""
The engine "ray" of an evaluation: actors of a cluster sample batches and compute their features, and this process receives both
and writes the files. An image depends on the seed and its number, so that a task that is repeated gives the same one.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import pyarrow
import torch
from safetensors.torch import load, save
from torch import nn

from ..data.ray_cluster import actor_device, run_in_actors
from .features import Batch, MeasuredBatch, measure_here
from .generate import SampledImages
from .image_files import complete, known_images, missing_images


IMAGES = "images"
SCHEMA = pyarrow.schema({"index": pyarrow.int64(), "content": pyarrow.large_binary(), "error": pyarrow.string()})


def measure_with_ray(
    samples: SampledImages, extractor: nn.Module, device: torch.device, num_actors: int, batches: Sequence[Batch]
) -> Iterator[MeasuredBatch]:
    """
    All batches, sampled and measured by `num_actors` workers of the cluster that this process is connected to; those that lie
    here as files are measured here, by the `extractor` on its `device`.
    """
    whole = [batch for batch in batches if not missing_images(samples.folder, batch.numbers)]
    yield from measure_here(samples.read, extractor, device, whole)
    waiting = {batch.index: batch for batch in batches if batch not in whole}
    if not waiting:
        return
    items = []
    for batch in waiting.values():
        # A few images of a batch may have files. They are needed for the features alone.
        numbers = [] if batch.has_features else batch.numbers
        known = known_images(samples.folder, samples.image_size, numbers)
        content = save({str(number): torch.tensor(image).contiguous() for number, image in known.items()})
        place = {"index": batch.index, "first": batch.numbers.start, "end": batch.numbers.stop}
        items.append({**place, "has_features": batch.has_features, "content": content})
    # Workers need not have the device of this process.
    arguments = {"samples": samples, "extractor": copy.deepcopy(extractor).cpu(), "device": actor_device()}
    with closing(run_in_actors(items, _Sampling, arguments, num_actors)) as tables:
        for table in tables:
            for row in table.to_pylist():
                if row["error"] is not None:
                    raise ValueError(row["error"])
                features = load(row["content"])
                images = features.pop(IMAGES)
                yield MeasuredBatch(waiting[row["index"]], images, features)


class _Sampling:
    """An actor that samples and measures batches."""

    def __init__(self, samples: SampledImages, extractor: nn.Module, device: torch.device):
        samples.to(device)
        self.samples, self.extractor, self.device = samples, extractor.to(device), device

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        rows = []
        for row in table.to_pylist():
            try:
                rows.append({"index": row["index"], "content": self._measure(row), "error": None})
            # What is wrong with model or extractor is said as it is. Ray would say it its own way.
            except ValueError as error:
                rows.append({"index": row["index"], "content": None, "error": str(error)})
        return pyarrow.Table.from_pylist(rows, schema=SCHEMA)

    def _measure(self, row: dict[str, Any]) -> bytes:
        known = {int(number): image.numpy() for number, image in load(row["content"]).items()}
        batch = Batch(row["index"], range(row["first"], row["end"]), row["has_features"])
        read = partial(complete, known, self.samples.sample)
        (_, images, features), *_ = measure_here(read, self.extractor, self.device, [batch])
        return save({name: values.cpu().contiguous() for name, values in {**features, IMAGES: images}.items()})
