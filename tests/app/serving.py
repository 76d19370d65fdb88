# SPDX-License-Identifier: Apache-2.0
"""The app of a pipeline, served for the time of a test."""

from contextlib import contextmanager

from hf_var.app.page import build_page, launch_page


@contextmanager
def served(pipe, **options):
    page = build_page(pipe, "hf_var")
    launch_page(page, prevent_thread_lock=True, quiet=True, **options)
    try:
        yield page
    finally:
        page.close()
