# SPDX-License-Identifier: Apache-2.0
"""Writing into the output folder of a run, and to its trackers."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError

from .checkpoints import checkpoint_folders


@contextmanager
def writing(output_dir: str | Path) -> Iterator[None]:
    """Turn errors of writing into an `OSError` with the path, the reason and the complete checkpoints."""
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


def save_image(output_dir: str | Path, name: str, step: int, image: Image.Image | Figure) -> Path:
    """Save `name`.png in the output folder and, with the step, in its `pictures/`, and return the latter."""
    path = Path(output_dir) / "pictures" / f"{name}-{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(image, Figure):
        image.savefig(path)
    else:
        image.save(path)
    shutil.copyfile(path, Path(output_dir) / f"{name}.png")
    return path


def show_image(trackers: Iterable[Any], path: Path, name: str, step: int) -> None:
    """Show an image file to the trackers that take images."""
    pixels = Image.open(path).convert("RGB")
    for tracker in trackers:
        # The two trackers need different formats.
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(pixels)[None]}, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [pixels]}, step)
