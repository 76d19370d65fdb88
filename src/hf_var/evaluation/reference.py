# SPDX-License-Identifier: Apache-2.0
"""Reference files that are published under an address."""

from pathlib import Path

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
    if "://" not in source:
        return source
    path = Path(HF_HOME) / "hf_var" / "references" / source.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Under another name until it is whole.
            torch.hub.download_url_to_file(source, str(path))
        except OSError as error:
            raise ValueError(
                f"The reference {source} cannot be downloaded ({error}). Download it elsewhere and give the file as "
                "`reference`."
            ) from error
    return str(path)
