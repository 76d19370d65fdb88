# SPDX-License-Identifier: Apache-2.0
"""The batches of a training run."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from transformers.utils import logging

from .config import BatchArguments
from .rows import RowReader, Tally
from .shuffled import ShuffledBatches
from .sources import AnyDataset
from .streamed import StreamedBatches


logger = logging.get_logger(__name__)


class TrainingBatches:
    """
    The endless batches of this process, on the CPU, which a checkpoint continues exactly: to be registered for
    checkpointing with Accelerate, but not prepared. An iterator begins after the last batch that was yielded, or after the
    one at which the loaded state was taken; what workers prefetched beyond it does not count.

    Images that cannot be read are left out and counted.

    Args:
        dataset (`Dataset` or `IterableDataset`): The rows.
        read_row ([`RowReader`]): How a row becomes an item: [`image_rows`] or [`codes_rows`].
        args ([`BatchArguments`]):
            `seed`, `train_batch_size`, `dataloader_num_workers`, `max_broken_share` and, for a stream,
            `shuffle_buffer_size`.
        process_index (`int`, *optional*, defaults to 0): This process.
        num_processes (`int`, *optional*, defaults to 1): Number of processes that train together.

    Raises:
        `ValueError`: While iterating, if too many images cannot be read, or if a stream has no rows for this process.
    """

    def __init__(
        self,
        dataset: AnyDataset,
        read_row: RowReader,
        args: BatchArguments,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.process_index = process_index
        self.num_processes = num_processes
        self.max_broken_share = args.max_broken_share
        self._batches: ShuffledBatches | StreamedBatches
        if isinstance(dataset, datasets.Dataset):
            self._batches = ShuffledBatches(dataset, read_row, args, process_index, num_processes)
        else:
            self._batches = StreamedBatches(dataset, read_row, args, process_index, num_processes)
        self._tally = Tally()
        self._warned = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch, tally in self._batches:
            self._tally.add(tally)
            self._report()
            yield batch

    @property
    def images_seen(self) -> int:
        """Images that this process looked at for the batches so far, the broken ones among them."""
        return self._tally.seen

    @property
    def broken_images(self) -> int:
        """Images among them that could not be read."""
        return self._tally.broken

    def first_items(self, number: int) -> dict[str, torch.Tensor]:
        """The first `number` items as training sees them, as one batch. The same in all processes; nothing moves on."""
        batch, tally = self._batches.first_items(number)
        tally.check(self.max_broken_share)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where all processes stand after their last batch. All of them have to call it together."""
        own = {
            "process_index": self.process_index,
            "streaming": isinstance(self._batches, StreamedBatches),
            "seen": self._tally.seen,
            "broken": self._tally.broken,
        } | self._batches.position()
        is_alone = self.num_processes == 1 or not torch.distributed.is_initialized()
        return {"processes": [own] if is_alone else gather_object([own])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue where `state` was taken.

        Raises:
            `ValueError`:
                If the data set is read in another way now. That of a stream depends on the numbers of processes and of
                workers and on `shuffle_buffer_size`; otherwise any numbers may change.
        """
        processes = state["processes"]
        streaming = isinstance(self._batches, StreamedBatches)
        if processes[0]["streaming"] != streaming:
            raise ValueError(f"`streaming` must be {not streaming}, as it was when the checkpoint was made.")
        self._batches.load_positions(processes)
        self._tally = Tally()
        for process in processes:
            if process["process_index"] % self.num_processes == self.process_index:
                self._tally.add(Tally(process["seen"], process["broken"]))

    def _report(self) -> None:
        self._tally.check(self.max_broken_share)
        if self._tally.broken > 0 and not self._warned and self._tally.last_reason is not None:
            self._warned = True
            logger.warning(
                f"An image cannot be read: {self._tally.last_reason}. It is left out, as are further ones, which are "
                "only counted."
            )
