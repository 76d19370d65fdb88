# SPDX-License-Identifier: Apache-2.0
"""
How fast the two engines of `hf-var tokenize` are, and what the death of a worker costs: 10,000 images of CIFAR-10 and a small
tokenizer with random weights, whose codes cost what those of a trained one cost.

    python benchmarks/tokenization_engines.py "cifar10/train-*.parquet"

The engine "accelerate" is one process of one thread or of two, "ray" a local cluster of two encoding workers of one thread each,
once as it is and once with one of them killed when half of the files are there. `start` is what a run with one batch of images
takes, and a rate is that of the other images in the time that a run takes longer. Needs the extra `ray`.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from accelerate import Accelerator

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.data.tokenization import tokenize_dataset
from hf_var.data.tokenization_config import TokenizationConfig


NUM_IMAGES, IMAGES_PER_FILE, BATCH_SIZE = 10_000, 500, 64
FILES = "codes-*.parquet"
KINDS = ("accelerate, 1 thread", "accelerate, 2 threads", "ray", "ray, killed")


def kill_worker(folder: Path) -> None:
    """Kill one of the encoding workers of this process's cluster when half of the files are there."""
    while len(list(folder.glob(FILES))) < NUM_IMAGES // IMAGES_PER_FILE // 2:
        time.sleep(0.01)
    children = psutil.Process().children(recursive=True)
    (worker, *_) = [child for child in children if "_Encoding" in " ".join(child.cmdline())]
    os.kill(worker.pid, signal.SIGKILL)


def seconds(source: str, vqvae: str, folder: Path, num_images: int, **engine) -> float:
    """What a run takes."""
    config = TokenizationConfig(
        data=source,
        split=f"train[:{num_images}]",
        vqvae=vqvae,
        output_dir=str(folder),
        resize_ratio=1.0,
        rows_per_shard=IMAGES_PER_FILE,
        batch_size=BATCH_SIZE,
        **engine,
    )
    begin = time.perf_counter()
    tokenize_dataset(config, Accelerator(cpu=True))
    return time.perf_counter() - begin


def main(source: str) -> None:
    torch.manual_seed(0)
    sizes = {"base_channels": 32, "channel_multipliers": (1, 2, 4), "num_res_blocks": 1, "norm_num_groups": 8}
    vqvae = VQVAEModel(VQVAEConfig(**sizes, latent_channels=16, codebook_size=1024, patch_nums=(1, 2, 3, 4, 6, 8)))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        vqvae.save_pretrained(place / "vqvae")
        begin = time.perf_counter()
        ray.init(include_dashboard=False, log_to_driver=False)
        found: dict[str, Any] = {"start of the cluster": round(time.perf_counter() - begin, 1)}
        files = []
        for kind in KINDS:
            engine = {"engine": "ray", "ray_actors": 2} if kind.startswith("ray") else {}
            torch.set_num_threads(2 if "2 threads" in kind else 1)
            start = seconds(source, str(place / "vqvae"), place / f"{kind}, start", BATCH_SIZE, **engine)
            if "killed" in kind:
                threading.Thread(target=kill_worker, args=(place / kind,), daemon=True).start()
            whole = seconds(source, str(place / "vqvae"), place / kind, NUM_IMAGES, **engine)
            rate = (NUM_IMAGES - BATCH_SIZE) / (whole - start)
            found[kind] = {"start": round(start, 1), "all": round(whole, 1), "images_per_second": round(rate)}
            files.append({path.name: path.read_bytes() for path in (place / kind).glob(FILES)})
        found["files are equal"] = all(each == files[0] for each in files)
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
