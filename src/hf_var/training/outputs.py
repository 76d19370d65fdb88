# SPDX-License-Identifier: Apache-2.0
"""Writing into the output folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .checkpoints import checkpoint_folders


@contextmanager
def writing(output_dir: str | Path) -> Iterator[None]:
    """
    Write inside the block.

    Raises:
        `OSError`: If something cannot be written, with the path, the reason and what is safe.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        path = getattr(error, "filename", None) or output_dir
        reason = getattr(error, "strerror", None) or str(error)
        names = [folder.name for folder in checkpoint_folders(output_dir)]
        safe = "No checkpoint was written before"
        if names:
            safe = f"The checkpoints {', '.join(names)} are complete: continue with `resume_from_checkpoint` latest"
        raise OSError(f"{path} cannot be written: {reason}. {safe}.") from error
