# SPDX-License-Identifier: Apache-2.0
"""
A training that uploads what it has so far to a Hub whose commits wait until somebody asks for the page `/open`. The page
`/waiting` comes when one does.
"""

import logging
import os
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from common import assert_draws, draw, save_drawing
from push import make_pipeline

from hf_var import VARPipeline
from hf_var.hub.push import BackgroundPush, create_repository


class Warnings(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def folders(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def ask_for(page: str) -> None:
    urlopen(os.environ["HF_ENDPOINT"] + page).close()


def main(output_dir: Path) -> None:
    logged = Warnings()
    logging.getLogger("hf_var.hub.push").addHandler(logged)
    leftover = output_dir / "unfinished-push-of-a-killed-run" / "transformer"
    leftover.mkdir(parents=True)
    (output_dir / "checkpoints").mkdir()
    pusher = BackgroundPush(create_repository(output_dir), output_dir)
    assert folders(output_dir) == ["checkpoints"]
    pusher.finish()
    assert pusher.is_free

    pipe = make_pipeline(seed=0)
    save_drawing(draw(pipe), output_dir.with_name("expected.npz"))
    first = pusher.new_folder()
    pipe.save_pretrained(first)
    assert pusher.push(first, "Step 1")
    # The training is here while the Hub holds the commit back.
    assert not pusher.is_free
    assert folders(output_dir) == ["checkpoints", first.name]
    second = pusher.new_folder()
    make_pipeline(seed=1).save_pretrained(second)
    assert not pusher.push(second, "Step 2")
    assert folders(output_dir) == ["checkpoints", first.name]
    assert not pusher.is_free
    ask_for("/open")
    pusher.finish()
    assert pusher.is_free
    assert folders(output_dir) == ["checkpoints"]
    assert logged.messages == []
    assert_draws(VARPipeline.from_pretrained(pusher.repo_id), output_dir.with_name("expected.npz"))

    third = pusher.new_folder()
    (third / "note.txt").write_text("three")
    assert pusher.push(str(third), "Step 3")
    pusher.finish()

    # Of somebody else, so that it fails.
    forbidden = BackgroundPush("other/model", output_dir)
    folder = forbidden.new_folder()
    (folder / "note.txt").write_text("four")
    assert forbidden.push(folder, "Step 4")
    forbidden.finish()
    assert forbidden.is_free
    (message,) = logged.messages
    assert "'Step 4' to other/model failed" in message, message
    assert folders(output_dir) == ["checkpoints"]
    # Nor does it keep the next one from being tried.
    folder = forbidden.new_folder()
    assert forbidden.push(folder, "Step 5")
    forbidden.finish()

    for other in (output_dir, third):
        with pytest.raises(ValueError, match=r"`folder` must be one of `new_folder\(\)`"):
            pusher.push(other, "Step 6")
    assert (output_dir / "checkpoints").is_dir()


def stop_while_uploading(output_dir: Path) -> None:
    pusher = BackgroundPush(create_repository(output_dir), output_dir)
    folder = pusher.new_folder()
    (folder / "note.txt").write_text("late")
    assert pusher.push(folder, "Step 1")
    ask_for("/waiting")
    raise SystemExit(5)


if __name__ == "__main__":
    {"train": main, "stop": stop_while_uploading}[sys.argv[1]](Path(sys.argv[2]))
