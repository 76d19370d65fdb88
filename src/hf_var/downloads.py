# SPDX-License-Identifier: Apache-2.0
"""Files that are published under an address, downloaded once."""

import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch


def download_once(url: str, folder: str | Path, argument: str) -> Path:
    """
    A file in `folder`, downloaded from `url` unless it is there. It has its name only when it is whole, so several
    processes may ask for it at once.

    Args:
        url (`str`): Where it is published. A name that ends with the beginning of the file's hash, such as
            `vgg16-397923af.pth`, is checked against the content.
        folder (`str`): Where to keep it.
        argument (`str`): What takes the path of a file instead, for the message.

    Raises:
        `ValueError`: If it cannot be downloaded, or is another file.
    """
    path = Path(folder, urlsplit(url).path.rpartition("/")[2])
    if not path.exists():
        digest = re.search(r"-([0-9a-f]{8,})$", path.stem)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest and digest[1], progress=False)
        except (OSError, HTTPException, RuntimeError) as error:
            raise ValueError(
                f"{url} cannot be downloaded ({error}). Download the file elsewhere and give its path as `{argument}`."
            ) from error
    return path


def download_weights(url: str, argument: str) -> str:
    """The path of a file of weights in torch's cache, see [`download_once`]."""
    return str(download_once(url, Path(torch.hub.get_dir(), "checkpoints"), argument))
