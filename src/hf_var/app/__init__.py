# SPDX-License-Identifier: Apache-2.0
"""The demo app: what it does with a pipeline, apart from the page that Gradio makes of it."""

from typing import Any

from ..pipelines.base import PipelineBase


def launch_app(pipe: PipelineBase, title: str = "hf_var", **options: Any) -> Any:
    r"""
    Serve the demo app of a pipeline. It needs the extra `app`. Nothing is loaded from or sent to the network.

    Args:
        pipe ([`VARPipeline`] or another of our pipelines):
            The model. The app shows what it can do: edits are for a VAR.
        title (`str`, *optional*, defaults to `"hf_var"`): Heading of the page.
        options:
            Those of Gradio's `Blocks.launch`, such as `server_name`, `server_port`, `share` (which is off unless it is
            passed) and `prevent_thread_lock`.

    Returns:
        `gradio.Blocks`: The app, whose `close()` ends the server. Without `prevent_thread_lock` this function returns
        when the server has ended.

    Raises:
        `ValueError`: If the model has no pictures to show, or is conditioned on images.
        `ModuleNotFoundError`: If Gradio is not installed.
        `OSError`: If the port is taken.
    """
    # It comes with an extra.
    from .page import build_page, launch_page

    page = build_page(pipe, title)
    launch_page(page, **options)
    return page


__all__ = ["launch_app"]
