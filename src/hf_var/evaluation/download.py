# SPDX-License-Identifier: Apache-2.0
"""Reference files that are published under an address."""

import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub.constants import HF_HOME


def find_reference(source: str) -> str:
    """
    The reference as a path or a name: an address is downloaded once, to `hf_var/references` in the folder of the Hub's
    client (`HF_HOME`).

    Args:
        source (`str`): Path, name on the Hub, or address of a file.

    Raises:
        `ValueError`: If it cannot be downloaded.
    """
    address = urlsplit(source)
    if address.scheme not in ("http", "https", "file"):
        return source
    # Files of one name lie at several addresses.
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    path = Path(HF_HOME) / "hf_var" / "references" / key / address.path.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Under another name until it is whole.
            torch.hub.download_url_to_file(source, str(path))
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"The reference {source} cannot be downloaded ({error}). Download it elsewhere and give the file as "
                "`reference`."
            ) from error
    return str(path)
