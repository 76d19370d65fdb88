# SPDX-License-Identifier: Apache-2.0
"""The log of a training, one line of JSON per entry."""

import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from ..files import whole_file


# The key of arguments that a resumed run changed.
CHANGES = "changed_arguments"


class TrainingLog(GeneralTracker):
    """`train_log.jsonl` in the output folder, as a tracker of Accelerate."""

    name = "train_log"
    requires_logging_directory = False

    def __init__(self, output_dir: str | Path):
        super().__init__()
        self.path = Path(output_dir) / "train_log.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def continue_after(self, step: int) -> None:
        """Drop the lines after `step`: a stopped run wrote them, and the resumed one writes them again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Keep only complete lines: an interrupted run may leave a partial one.
        lines = self.path.read_text().splitlines(keepends=True) if step > 0 and self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and self._is_kept(json.loads(line), step)]
        with whole_file(self.path) as place:
            place.write_text("".join(kept))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def _is_kept(self, line: dict[str, Any], step: int) -> bool:
        # A resumed run logs its changed arguments again.
        return line["step"] < step or (line["step"] == step and CHANGES not in line)

    def last(self, name: str) -> Any:
        """The newest value of a metric, `None` if there is none."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines() if f'"{name}"' in line]
        return lines[-1][name] if lines else None
