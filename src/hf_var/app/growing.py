# SPDX-License-Identifier: Apache-2.0
"""Pictures of a pipeline's call while it runs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import Any

from PIL import Image


def growing_pictures(call: Callable[..., Any]) -> Iterator[tuple[int | None, list[Image.Image]]]:
    """
    The pictures after each step of `call`, which runs a pipeline with the callback that it gets, with the number of the
    scale, and at last its result with `None`. If the iterator is closed, the call is interrupted.
    """
    steps: SimpleQueue[tuple[int, list[Image.Image]] | None] = SimpleQueue()
    is_closed = Event()

    def show(pipe: Any, step: int, k: int, tensors: dict[str, Any]) -> None:
        if is_closed.is_set():
            pipe._interrupt = True
            return
        processor = pipe.image_processor
        steps.put((k, processor.numpy_to_pil(processor.pt_to_numpy(tensors["images"]))))

    # The pipeline keeps the state of a call by its thread.
    with ThreadPoolExecutor(max_workers=1) as worker:
        running = worker.submit(call, callback_on_step_end=show, callback_on_step_end_tensor_inputs=["images"])
        running.add_done_callback(lambda _: steps.put(None))
        try:
            while (step := steps.get()) is not None:
                yield step
        finally:
            is_closed.set()
        yield None, running.result().images
