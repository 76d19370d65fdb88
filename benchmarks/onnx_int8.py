# SPDX-License-Identifier: Apache-2.0
"""
What onnxruntime's dynamic 8-bit quantization of the exported transformer changes: time of a step, logits and codes.

    python benchmarks/onnx_int8.py                                  # the embedded digits
    python benchmarks/onnx_int8.py --hidden_size 1024 --num_layers 4  # random weights of VAR-d16's width
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from digits_quality import measure

from hf_var import DIGITS_CHECKPOINT, VARConfig, VARPipeline, VARTransformer
from hf_var.export import export_model


sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import draw_onnx


def make_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step_inputs(graphs: draw_onnx.Graphs, batch: int, length: int) -> dict[str, np.ndarray]:
    """Random inputs of the last `length` tokens of `batch` images."""
    source, found = np.random.default_rng(0), {}
    described = graphs.description["graphs"]["transformer"]["inputs"]
    total = sum(graphs.description["block_lengths"])
    sizes = {"batch": batch, "past": total - length, "tokens": length}
    for name, entry in described.items():
        shape = [sizes.get(size, size) for size in entry["shape"]]
        found[name] = source.standard_normal(shape).astype(np.float32)
    found["positions"] = np.arange(total - length, total)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hidden_size", type=int, help="width of a transformer with random weights, in place of the digits"
    )
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        plain, small = Path(place) / "fp32", Path(place) / "int8"
        if options.hidden_size is None:
            model = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
        else:
            torch.manual_seed(0)
            sizes = {"hidden_size": options.hidden_size, "num_hidden_layers": options.num_layers}
            # Open gates, as after a training: nearly closed ones would hide the errors of the layers.
            gates = {"initializer_adaln_gamma_factor": 0.5, "initializer_head_factor": 1.0}
            config = VARConfig(num_attention_heads=options.hidden_size // 64, **gates, **sizes)
            model = VARTransformer(config)
        for folder, int8 in ((plain, False), (small, True)):
            export_model(model, folder, int8=int8)
        folders = {"fp32": draw_onnx.Graphs(plain), "int8": draw_onnx.Graphs(small)}
        for graphs in folders.values():
            graphs.sessions["transformer"] = make_session(graphs.folder / "transformer.onnx")
        megabytes = {name: (each.folder / "transformer.onnx").stat().st_size / 1e6 for name, each in folders.items()}
        print({name: f"{size:.1f} MB" for name, size in megabytes.items()})
        length = folders["fp32"].description["block_lengths"][-1]
        inputs, times, logits = step_inputs(folders["fp32"], options.batch_size, length), {}, {}
        for _ in range(options.repeats):
            for name, graphs in folders.items():
                # Of one thread, whatever else the machine does.
                begin = time.process_time()
                logits[name] = graphs("transformer", **inputs)["logits"]
                times.setdefault(name, []).append(time.process_time() - begin)
        for name, values in times.items():
            print(
                f"{name}: last scale of {options.batch_size} in {statistics.median(values) * 1000:.1f} ms of one core"
            )
        error = (logits["int8"] - logits["fp32"]).std() / logits["fp32"].std()
        print(f"error of the logits: {error:.3f} of their standard deviation")
        if options.hidden_size is None:
            compare_digits(folders)


def compare_digits(folders: dict[str, draw_onnx.Graphs]) -> None:
    """Print the quality of 1,000 digits of the same noise, and how many of their codes are equal."""
    labels, codes = np.repeat(np.arange(10), 100), {}
    for name, graphs in folders.items():
        condition = draw_onnx.condition_of(graphs, labels.tolist(), None, guided=True)
        settings = {key: value for key, value in graphs.description["sampling"].items() if key != "guidance_rule"}
        codes[name] = draw_onnx.draw(graphs, condition, np.random.default_rng(0).standard_exponential, **settings)
        images = (graphs("decode", codes=codes[name])["sample"][:, 0] + 1) / 2
        quality = measure(images, labels)
        print(name, {metric: round(quality[metric], 3) for metric in ("accuracy", "variance", "frechet")})
    print(f"equal codes: {(codes['int8'] == codes['fp32']).mean():.3f}")


if __name__ == "__main__":
    main()
