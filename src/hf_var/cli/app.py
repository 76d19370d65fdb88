# SPDX-License-Identifier: Apache-2.0
"""The demo app: `hf-var app`."""

import argparse
import socket
from pathlib import Path

from .. import EMOJI_CHECKPOINT
from .flags import TRUTH_VALUES, add_model


def add_app(commands) -> None:
    """Add the command `app`."""
    parser = commands.add_parser(
        "app",
        help="try a model in the browser",
        description="Serve a page on which a model draws, repaints, varies, scores and reconstructs pictures. Without "
        "--model, it draws emoji of prompts with a checkpoint that ships with the package. Ctrl+C ends it.",
        epilog="example: hf-var app --model digits --port 7860",
    )
    parser.set_defaults(check=_check, run=_app)
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 lets other machines in (127.0.0.1, none)"
    )
    parser.add_argument("--port", type=int, metavar="N", help="(the first free one from 7860 on)")
    parser.add_argument(
        "--share",
        type=_truth,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="also make the page public, through a server of Gradio's (false)",
    )
    add_model(parser)
    parser.set_defaults(model=EMOJI_CHECKPOINT)


def _truth(text: str) -> bool:
    if text.lower() not in TRUTH_VALUES:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return TRUTH_VALUES[text.lower()]


def _check(options: argparse.Namespace) -> None:
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ValueError(f"--port must be from 1 to 65535, got {options.port}.")
    # Gradio tries a hundred ports on any error.
    try:
        # An address of the sixth version may stand in brackets, as in a URL.
        host = options.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, options.port or 0), family=family).close()
    except OSError as error:
        raise ValueError(f"--host {options.host} --port {options.port or 'any'} cannot be served: {error}.") from error


def _app(options: argparse.Namespace) -> None:
    # Gradio comes with an extra.
    from ..app.page import build_page, launch_page
    from .common import open_pipeline

    page = build_page(open_pipeline(options), f"hf_var: {Path(options.model).name}")
    address = {"server_name": options.host, "server_port": options.port, "share": options.share}
    launch_page(page, **address, quiet=True, prevent_thread_lock=True)
    print(f"{page.share_url or page.local_url} shows the app. Ctrl+C ends it.", flush=True)
    page.block_thread()
