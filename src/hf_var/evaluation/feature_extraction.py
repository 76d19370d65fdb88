# SPDX-License-Identifier: Apache-2.0
"""Drawing, decoding, features and files at the same time."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..metrics.feature_extractors import extract_features
from .feature_files import FeatureFiles
from .generate import ImageDrawer
from .image_files import png_path, read_png, write_png


# Batches that wait for their features and files while further ones are drawn: more would only need memory.
MAX_PENDING = 2
# Compressing a PNG takes a core as long as drawing an image takes an accelerator, or longer.
PNG_THREADS = min(8, os.cpu_count() or 1)

# Gives the images of batches of consecutive numbers, in increasing order.
ImageSource = Callable[[Sequence[range]], Iterator[torch.Tensor]]


class Stopwatch:
    """Seconds by stage, summed over the threads that work on it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time inside of the context to a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin


class DrawnImages:
    """
    The images of a drawer, those that are files already from there.

    Args:
        drawer ([`ImageDrawer`]): Draws what is missing.
        folder (`Path`): Folder of the PNG files.
        image_size (`tuple[int, int]`): Height and width.
        stopwatch ([`Stopwatch`]): For the stages `draw`, `decode` and `read`.
    """

    def __init__(self, drawer: ImageDrawer, folder: Path, image_size: tuple[int, int], stopwatch: Stopwatch):
        self.drawer = drawer
        self.folder = folder
        self.image_size = image_size
        self.stopwatch = stopwatch

    def missing(self, numbers: range) -> list[int]:
        """Those of the images that are no files yet."""
        return [number for number in numbers if not png_path(self.folder, number).exists()]

    def __call__(self, batches: Sequence[range]) -> Iterator[torch.Tensor]:
        """
        Batches of images, `torch.ByteTensor` of shape `(batch, 3, height, width)`.

        Raises:
            `ValueError`: If a file is broken.
        """
        for numbers in batches:
            missing = self.missing(numbers)
            if not missing:
                with self.stopwatch.measure("read"):
                    images = [read_png(png_path(self.folder, number), self.image_size) for number in numbers]
                yield torch.from_numpy(np.stack(images))
                continue
            # The whole batch, for what is rounded depends on its size.
            with self.stopwatch.measure("draw"):
                latents = self.drawer.latents(numbers)
                _wait_for(latents.device)
            with self.stopwatch.measure("decode"):
                images = self.drawer.decode(latents)
                _wait_for(latents.device)
            # What is a file already is what counts, even where another batch size or device rounds otherwise.
            for place in [place for place, number in enumerate(numbers) if number not in missing]:
                pixels = read_png(png_path(self.folder, numbers[place]), self.image_size)
                images[place] = torch.from_numpy(pixels).to(images.device)
            yield images


class Outputs:
    """
    Turns images into features and PNG files while the caller makes the next ones.

    Args:
        files ([`FeatureFiles`]): Where the features go.
        extractor (`nn.Module`): See [`~hf_var.metrics.feature_extractors.extract_features`].
        device (`torch.device`): Where the extractor is.
        stopwatch ([`Stopwatch`]): For the stages `features`, `png` and `wait`.
        folder (`Path`, *optional*): Folder of PNG files that are to be written as far as they are missing.
    """

    def __init__(
        self,
        files: FeatureFiles,
        extractor: nn.Module,
        device: torch.device,
        stopwatch: Stopwatch,
        folder: Path | None = None,
    ):
        self.files = files
        self.extractor = extractor
        self.device = device
        self.stopwatch = stopwatch
        self.folder = folder
        # A new thread would begin on the first accelerator.
        choose_device = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
        self._threads = ThreadPoolExecutor(1, initializer=choose_device), ThreadPoolExecutor(PNG_THREADS)
        self._pending: deque[tuple[int, range, Future | None, list[Future]]] = deque()
        self._parts: list[dict[str, torch.Tensor]] = []

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._drain(0)
        finally:
            for threads in self._threads:
                threads.shutdown(cancel_futures=True)

    def add(self, index: int, numbers: range, images: torch.Tensor) -> None:
        """
        Take a batch, the next one of its file.

        Args:
            index (`int`): File of features.
            numbers (`range`): Numbers of the images.
            images (`torch.ByteTensor` of shape `(batch, 3, height, width)`): The images.
        """
        extracting, writing = self._threads
        features = None
        if not self.files.path(index).exists():
            features = extracting.submit(self._extract, images)
        written = []
        if self.folder is not None:
            pixels = images.cpu().numpy()
            for number, image in zip(numbers, pixels, strict=True):
                path = png_path(self.folder, number)
                if not path.exists():
                    written.append(writing.submit(self._write, path, image))
        self._pending.append((index, numbers, features, written))
        self._drain(MAX_PENDING)

    def _drain(self, most: int) -> None:
        while len(self._pending) > most:
            index, numbers, features, written = self._pending.popleft()
            with self.stopwatch.measure("wait"):
                for future in written:
                    future.result()
                if features is None:
                    continue
                self._parts.append(features.result())
            if numbers.stop == self.files.range(index).stop:
                self.files.save(
                    index, {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
                )
                self._parts.clear()

    # Whether gradients are tracked is a matter of the thread.
    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.stopwatch.measure("features"):
            # In one layout, on which the last bits depend, whether they were drawn or read.
            features = extract_features(self.extractor, images.to(self.device).contiguous())
            return {name: values.cpu() for name, values in features.items()}

    def _write(self, path: Path, image) -> None:
        with self.stopwatch.measure("png"):
            write_png(path, image)


def missing_batches(files: FeatureFiles, source: ImageSource, batch_size: int) -> list[list[tuple[int, range]]]:
    """
    What is to be done, file by file: batches of the images whose features or pictures are missing. They are cut alike
    however many processes there are and whatever is there already.

    Args:
        files ([`FeatureFiles`]): The features.
        source (`Callable`): Gives the images; of a [`DrawnImages`] the files are looked for as well.
        batch_size (`int`): Images at once; a file's last batch may have fewer.

    Returns:
        `list[list[tuple[int, range]]]`: For each file its number and the numbers of the images, of each batch.
    """
    work = []
    for index in range(len(files)):
        numbers = files.range(index)
        batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
        if files.path(index).exists():
            # Its features are known, but a picture may have been deleted.
            batches = [batch for batch in batches if isinstance(source, DrawnImages) and source.missing(batch)]
        work.append([(index, batch) for batch in batches])
    return [batches for batches in work if batches]


def write_features(work: list[tuple[int, range]], source: ImageSource, outputs: Outputs, is_shown: bool) -> None:
    """
    Write features and pictures.

    Args:
        work (`list[tuple[int, range]]`): This process's part of [`missing_batches`].
        source (`Callable`): Gives the images, `torch.ByteTensor` of shape `(batch, 3, height, width)`.
        outputs ([`Outputs`]): Takes them.
        is_shown (`bool`): Whether there is a progress bar.
    """
    if not work:
        return
    total = sum(len(numbers) for _, numbers in work)
    bar = tqdm(total=total, desc=outputs.files.kind, unit="image", disable=not is_shown)
    with bar, outputs:
        for (index, numbers), images in zip(work, source([numbers for _, numbers in work]), strict=True):
            outputs.add(index, numbers, images)
            bar.update(len(numbers))


def _wait_for(device: torch.device) -> None:
    # So that each stage is charged with its own time; what is lost is a launch per batch.
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
