# SPDX-License-Identifier: Apache-2.0
"""Pictures of a pipeline's call while it runs."""

from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from ..pipelines.previews import stream_call


def growing_pictures(call: Callable[..., Any]) -> Iterator[tuple[int | None, list[Image.Image]]]:
    """
    The pictures after each step of `call`, which runs a pipeline with the callback that it gets, with the number of the
    scale, and at last its result with `None`. If the iterator is closed, the call is interrupted.
    """

    def run(**callback: Any) -> tuple[None, list[Image.Image]]:
        return None, call(**callback, callback_on_step_end_tensor_inputs=["images"]).images

    def show(pipe: Any, step: int, k: int, tensors: dict[str, Any]) -> tuple[int, list[Image.Image]]:
        processor = pipe.image_processor
        return k, processor.numpy_to_pil(processor.pt_to_numpy(tensors["images"]))

    return stream_call(run, show)
