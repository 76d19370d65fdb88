# SPDX-License-Identifier: Apache-2.0
"""Progress bars of long jobs."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*iterable: Any, is_shown: bool, **options: Any) -> tqdm:
    """A bar of tqdm, which writes fewer lines if the output is a log file."""
    return tqdm(*iterable, disable=not is_shown, mininterval=0.1 if sys.stderr.isatty() else 30, **options)
