# SPDX-License-Identifier: Apache-2.0
"""Reference files that are published under an address."""

import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub.constants import HF_HOME

from ..downloads import download_once


def find_reference(source: str) -> str:
    """The reference as a path or a name: an address is downloaded once, to `hf_var/references` in `HF_HOME`."""
    if urlsplit(source).scheme not in ("http", "https", "file"):
        return source
    # Files of one name lie at several addresses.
    key = hashlib.sha256(source.encode()).hexdigest()[:12]
    return str(download_once(source, Path(HF_HOME, "hf_var", "references", key), "reference"))
