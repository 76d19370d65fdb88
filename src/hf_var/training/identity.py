# SPDX-License-Identifier: Apache-2.0
"""The identity of a run, saved in its checkpoints and compared when the run is resumed."""

import inspect
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..data.resumable_settings import first_difference


IDENTITY_FILE = "run.json"
# Arguments that belong to a call, not to the training.
CALL_ARGUMENTS = {"output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"}
CALL_ARGUMENTS |= {"logging_steps", "report_to", "push_to_hub", "hub_model_id", "push_steps"}


@dataclass(frozen=True)
class RunIdentity:
    """What decides the course of a run, saved in its checkpoints: what is `fixed`, and `arguments` that may change."""

    fixed: Mapping[str, Any]
    arguments: Mapping[str, Any]

    def check(self, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
        """The arguments that differ from a checkpoint's, as they were and are; fixed values must not."""
        begun = read_identity(checkpoint)
        now = as_json({"fixed": self.fixed, "arguments": self.arguments})
        difference = first_difference(begun["fixed"], now["fixed"])
        if difference is not None:
            name, before, value = difference
            raise ValueError(
                f"`{name}` must be {before!r} as when the checkpoint {str(checkpoint)!r} was made, got {value!r}. To train "
                "with another one, choose another `output_dir`."
            )
        names = {**begun["arguments"], **now["arguments"]}
        pairs = {name: (begun["arguments"].get(name), now["arguments"].get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def make_identity(
    arguments: Mapping[str, Any],
    fixed_arguments: Collection[str],
    config: PreTrainedConfig,
    free_fields: Collection[str],
    **fixed: Any,
) -> RunIdentity:
    """The identity of a run, with arguments of it and fields of its model's configuration that may change or not."""
    fields = {name: getattr(config, name) for name in inspect.get_annotations(type(config))}
    named = {name: arguments.get(name) for name in fixed_arguments}
    sizes = {name: value for name, value in fields.items() if name not in free_fields}
    free = {name: value for name, value in arguments.items() if name not in {*fixed_arguments, *CALL_ARGUMENTS}}
    return RunIdentity({**named, **sizes, **fixed}, {**free, **{name: fields[name] for name in free_fields}})


def write_identity(folder: Path, identity: RunIdentity, num_processes: int) -> None:
    """Write it into a checkpoint."""
    content = {"fixed": identity.fixed, "arguments": identity.arguments, "num_processes": num_processes}
    (folder / IDENTITY_FILE).write_text(json.dumps(as_json(content), indent=2), encoding="utf-8")


def read_identity(folder: Path) -> dict[str, Any]:
    """What [`write_identity`] wrote."""
    path = folder / IDENTITY_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("fixed", "arguments", "num_processes")}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is damaged: {path.name} cannot be read ({error})."
        ) from error


def as_json(content: Any) -> Any:
    """`content` as a file of JSON gives it back: tuples are lists, and all keys are texts."""
    return json.loads(json.dumps(content))
