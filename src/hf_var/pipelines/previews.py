# SPDX-License-Identifier: Apache-2.0
"""The images of a running call, scale by scale, for servers that show what is coming."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from ..ranges import NonNegativeInt, checked


class StreamMixin:
    """`stream` of the pipelines that sample whole scales."""

    def stream(self, *inputs, partial_images: int | None = None, **options) -> Iterator[Any]:
        r"""
        Call the pipeline and yield its images while they come: previews after some scales, and at last the images of the
        call, which are those of a call without previews. They need no more than the decoder: after a scale the latents
        are already those of a coarse image.

        The call runs in a thread of its own, which an `autocast` around the loop does not reach. When the loop is left
        early (a client has gone, for instance), the call ends with the scale that it is at.

        Args:
            inputs, options: Arguments of the call, but for its callback.
            partial_images (`int`, *optional*, defaults to all scales but the last):
                Number of previews, at equal distances, as in OpenAI's interface of images; 0 for none. There are fewer
                where fewer scales are sampled.

        Returns:
            `Iterator`: The images of the batch in the form of `VARPipelineOutput.images`, once for each preview and once
            for the result. Of several candidates (`num_candidates`) the first has previews.

        Raises:
            `ValueError`: As a call, when the first images are asked for, or if an argument is one of a callback.

        Example:

        ```python
        >>> import torch
        >>> from hf_var import DIGITS_CHECKPOINT, VARPipeline

        >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        >>> for images in pipe.stream(prompt="3", generator=torch.Generator().manual_seed(0), partial_images=2):
        ...     images[0].save("image.png")  # two previews, then the image
        ```
        """
        pipe: Any = self
        if partial_images is not None:
            partial_images = checked("partial_images", partial_images, NonNegativeInt)
        for name in ("callback_on_step_end", "callback_on_step_end_tensor_inputs"):
            if name in options:
                raise ValueError(f"`{name}` must not be passed to `stream`, which is a callback itself.")
        shown = set()

        def call(**callback: Any) -> Any:
            return pipe(*inputs, **{**options, "return_dict": True}, **callback).images

        def preview(pipe: Any, step: int, k: int, tensors: dict[str, Any]) -> Any:
            if step + 1 not in preview_steps(pipe.num_timesteps, partial_images) - shown:
                return None
            shown.add(step + 1)
            return pipe._images(tensors["latents"], options.get("output_type", "pil"))

        yield from stream_call(call, preview)


def stream_call(call: Callable[..., Any], show: Callable[[Any, int, int, dict[str, Any]], Any]) -> Iterator[Any]:
    """
    What `show` makes of the steps of a pipeline's call, `None` for nothing, while it runs in a thread, and at last what it
    returns. `call` gets the callback as an argument. If the iterator is closed, the call is interrupted.
    """
    found, is_left = SimpleQueue(), threading.Event()

    def callback(pipe: Any, step: int, k: int, tensors: dict[str, Any]) -> None:
        if is_left.is_set():
            pipe._interrupt = True
        elif (item := show(pipe, step, k, tensors)) is not None:
            found.put((item, None))

    def run() -> None:
        try:
            found.put((call(callback_on_step_end=callback), None))
        except BaseException as error:  # the thread that waits raises it
            found.put((None, error))
        found.put(None)

    # The pipeline keeps the state of a call by its thread.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while (item := found.get()) is not None:
            made, error = item
            if error is not None:
                raise error
            yield made
    finally:
        is_left.set()
        thread.join()


def preview_steps(num_steps: int, partial_images: int | None) -> set[int]:
    """After how many of `num_steps` steps there is a preview; the last step has the result."""
    if partial_images is None or partial_images >= num_steps:
        return set(range(1, num_steps))
    return {round(num_steps * number / (partial_images + 1)) for number in range(1, partial_images + 1)}
