# SPDX-License-Identifier: Apache-2.0
"""
What a checkpoint and the final weights of a sharded training cost: two processes on CPUs, each with half of a VARTransformer
(FSDP2) and of three more tensors for each of its parameters, as many as moments and averages are.

    python benchmarks/sharded_checkpoints.py                     # 12 layers of width 768
    python benchmarks/sharded_checkpoints.py --hidden_size 1024 --num_layers 16

Memory is what the first process holds itself at most (files that the system maps do not count), in multiples of all weights.
`gathered` is how the whole state would come to the first process at once.
"""

import argparse
import ctypes
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_var import VARConfig, VARTransformer
from hf_var.training.average import AveragedWeights
from hf_var.training.checkpoints import Checkpoints
from hf_var.training.identity import RunIdentity
from hf_var.training.sharding import whole_model


def own_memory() -> int:
    """Bytes that this process holds and that no file has."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@contextmanager
def measured(name: str, weights: int, found: dict[str, dict[str, float]]) -> Iterator[None]:
    """Time and growth of the memory of the block."""
    # What was freed before would be used again.
    ctypes.CDLL(None).malloc_trim(0)
    is_over, begin, largest = threading.Event(), own_memory(), [0]

    def watch() -> None:
        while not is_over.wait(0.005):
            largest[0] = max(largest[0], own_memory() - begin)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    is_over.set()
    thread.join()
    found[name] = {"seconds": round(seconds, 2), "memory": round(largest[0] / weights, 2)}


def measure(folder: str, hidden_size: int, num_layers: int) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    config = VARConfig(hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64)
    transformer = VARTransformer(config)
    weights = 4 * transformer.num_parameters()
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    for layer in transformer.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    found: dict[str, dict[str, float]] = {}
    others = ("average", "first moments", "second moments")
    parts = {"model": transformer, **{name: AveragedWeights(transformer, 0.99) for name in others}}
    checkpoints = Checkpoints(accelerator, folder, total_limit=1)
    with measured("checkpoint, in all", weights, found):
        start = time.perf_counter()
        checkpoints.save(1, parts, RunIdentity({}, {}))
        waited = time.perf_counter() - start
        checkpoints.finish()
    found["checkpoint, what the training waits for"] = {"seconds": round(waited, 2)}
    with measured("checkpoint, read back", weights, found):
        checkpoints.load(Path(folder) / "checkpoints/step-00000001", parts)
    with measured("whole weights, gathered", weights, found):
        state = get_model_state_dict(transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    del state
    with measured("whole weights, by files", weights, found):
        whole = whole_model(transformer, lambda: VARTransformer(config), folder)
        if whole is not None:
            whole.save_pretrained(Path(folder) / "final")
    if accelerator.is_main_process:
        stored = sum(path.stat().st_size for path in (Path(folder) / "checkpoints").rglob("*") if path.is_file())
        print(f"{weights / 1e9:.2f} GB of weights, {stored / 1e9:.2f} GB of a checkpoint")
        print(json.dumps(found, indent=1))
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--num_layers", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(measure, (folder, options.hidden_size, options.num_layers), num_processes=2)


if __name__ == "__main__":
    main()
