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


def write_note(folder: Path, text: str) -> None:
    (folder / "note.txt").write_text(text)


def main(output_dir: Path) -> None:
    logged = Warnings()
    logging.getLogger("hf_var.hub.push").addHandler(logged)
    leftover = output_dir / ".unfinished-push-of-a-killed-run" / "transformer"
    leftover.mkdir(parents=True)
    (output_dir / "checkpoints").mkdir()
    pusher = BackgroundPush(create_repository(output_dir), output_dir)
    assert folders(output_dir) == ["checkpoints"]
    pusher.finish()
    assert pusher.is_free

    pipe = make_pipeline(seed=0)
    save_drawing(draw(pipe), output_dir.with_name("expected.npz"))
    assert pusher.push(pipe.save_pretrained, "Step 1")
    # The training is here while the Hub holds the commit back.
    assert not pusher.is_free
    folder, checkpoints = folders(output_dir)
    assert (checkpoints, folder[:17]) == ("checkpoints", ".unfinished-push-")
    assert not pusher.push(make_pipeline(seed=1).save_pretrained, "Step 2")
    assert folders(output_dir) == [folder, "checkpoints"]
    assert not pusher.is_free
    ask_for("/open")
    pusher.finish()
    assert pusher.is_free
    assert folders(output_dir) == ["checkpoints"]
    assert logged.messages == []
    assert_draws(VARPipeline.from_pretrained(pusher.repo_id), output_dir.with_name("expected.npz"))

    assert pusher.push(lambda folder: write_note(folder, "three"), "Step 3")
    pusher.finish()

    # Of somebody else, so that it fails.
    forbidden = BackgroundPush("other/model", output_dir)
    assert forbidden.push(lambda folder: write_note(folder, "four"), "Step 4")
    forbidden.finish()
    assert forbidden.is_free
    (message,) = logged.messages
    assert "'Step 4' to other/model failed" in message, message
    assert folders(output_dir) == ["checkpoints"]
    # Nor does it keep the next one from being tried.
    assert forbidden.push(lambda folder: write_note(folder, "five"), "Step 5")
    forbidden.finish()
    assert (output_dir / "checkpoints").is_dir()


def stop_while_uploading(output_dir: Path) -> None:
    pusher = BackgroundPush(create_repository(output_dir), output_dir)
    assert pusher.push(lambda folder: write_note(folder, "late"), "Step 1")
    ask_for("/waiting")
    raise SystemExit(5)


if __name__ == "__main__":
    {"train": main, "stop": stop_while_uploading}[sys.argv[1]](Path(sys.argv[2]))
