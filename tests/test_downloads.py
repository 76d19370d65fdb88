# SPDX-License-Identifier: Apache-2.0
"""Files are downloaded once, checked where their names tell how, and whole or missing."""

import hashlib
from pathlib import Path

import pytest

from hf_var.downloads import download_once


def publish(folder: Path, content: bytes, digest: str | None = None) -> str:
    digest = digest or hashlib.sha256(content).hexdigest()[:8]
    path = folder / f"weights-{digest}.bin"
    path.write_bytes(content)
    return path.as_uri()


def test_a_file_is_downloaded_once(tmp_path: Path) -> None:
    url = publish(tmp_path, b"content")
    path = download_once(url, tmp_path / "cache", "weights")
    assert path.read_bytes() == b"content"
    (tmp_path / path.name).unlink()
    assert download_once(url, tmp_path / "cache", "weights") == path


def test_another_content_than_the_name_tells_is_refused(tmp_path: Path) -> None:
    url = publish(tmp_path, b"content", digest="0123abcd")
    with pytest.raises(ValueError, match=r"invalid hash value.*give its path as `weights`"):
        download_once(url, tmp_path / "cache", "weights")
    assert not list((tmp_path / "cache").iterdir())


def test_names_without_a_hash(tmp_path: Path) -> None:
    (tmp_path / "set-of-images.npz").write_bytes(b"images")
    path = download_once((tmp_path / "set-of-images.npz").as_uri(), tmp_path / "cache", "reference")
    assert path.read_bytes() == b"images"
    with pytest.raises(ValueError, match="missing.npz cannot be downloaded.*`reference`"):
        download_once((tmp_path / "missing.npz").as_uri(), tmp_path / "cache", "reference")
