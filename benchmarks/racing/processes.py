# SPDX-License-Identifier: Apache-2.0
"""
Scripts in processes of their own, with one thread, whose core-seconds are measured.

The processes are forked from one that has imported the libraries, which takes each of them eight seconds, before any work:
so nothing of it counts, and nothing that ran before can change a training. On systems without this they start afresh.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_var.files import whole_file


REPOSITORY = Path(__file__).parents[2]
# What the scripts import.
PRELOADED = ["torch", "accelerate", "datasets", "diffusers", "matplotlib.figure", "sklearn.cluster"]
PRELOADED += [f"hf_var.{name}" for name in ("training.setup", "training.prior_data", "cli.arguments", "hub.cards")]
PRELOADED += [f"hf_var.{name}" for name in ("training.codebook_training", "pipelines.base", "metrics.latents")]
PRELOADED += ["hf_var.metrics.generation", "hf_var.data.tokenization", "hf_var.training.lora"]
LOG_LINES = 30


def run_process(function: Callable[..., Any], *arguments: Any, log: Path, result: Path) -> Any:
    """
    What `function`, of a module, returns in a process of its own with one thread. `log` gets all that it prints, and
    `result` what it returns, as JSON. A `RuntimeError` with the end of the log if it fails.
    """
    # The libraries read it when they are imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    is_forked = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if is_forked else "spawn")
    if is_forked:
        context.set_forkserver_preload(PRELOADED)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_call, args=(function, arguments, log, result), daemon=True)
    process.start()
    process.join()
    if process.exitcode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise RuntimeError("\n".join([f"Exit code {process.exitcode}, the end of {log}:", *lines]))
    return json.loads(result.read_text(encoding="utf-8"))


def _call(function: Callable[..., Any], arguments: Sequence[Any], log: Path, result: Path) -> None:
    import torch

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        returned = function(*arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    write_json(result, returned)


def run_script(path: str, argv: Sequence[str]) -> float:
    """
    Core-seconds of a script of the repository from its `main` on: the processor time of all threads, without the imports.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    start = time.process_time()
    module.main(list(argv))
    return time.process_time() - start


def write_json(path: Path, content: Any) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as place:
        place.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a file holds, `None` if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
