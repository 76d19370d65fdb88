# SPDX-License-Identifier: Apache-2.0
"""Models and pipelines as graphs for other runtimes."""

import argparse
from pathlib import Path
from typing import Any

from .flags import add_source, check_output


# Those of `export_model`, which brings torch.
FORMATS = ("onnx", "openvino")


def add_export(commands) -> None:
    """Add the command `export`."""
    parser = commands.add_parser(
        "export",
        help="write a model as graphs that run without torch",
        description="Write a pipeline, or one of its models, as graphs of ONNX or OpenVINO in fp32: encoding, decoding, the "
        "condition and the prediction of tokens, with a description in export.json.",
        epilog="example: hf-var export --model user/var-d16-256 --format onnx --output var-d16-256-onnx",
    )
    parser.set_defaults(check=_check, run=_export)
    add_source(parser)
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"of the files ({FORMATS[0]})")
    parser.add_argument("--int8", action="store_true", help="8-bit weights of the transformer, for onnx")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")


def _check(options: argparse.Namespace) -> None:
    check_output(options.output, is_folder=True)
    if options.int8 and options.format != "onnx":
        raise ValueError(f"--int8 goes with --format onnx, got {options.format}.")


def _export(options: argparse.Namespace) -> None:
    from ..export import export_model

    export_model(_load(options), options.output, options.format, options.int8)
    print(f"wrote {options.output}")


def _load(options: argparse.Namespace) -> Any:
    """The pipeline or model in a folder or repository: only the latter has a configuration at its root."""
    import torch
    from transformers import AutoModel
    from transformers.utils import cached_file

    from ..pipelines.base import load_pipeline

    place = {"revision": options.revision}
    config = cached_file(options.model, "config.json", _raise_exceptions_for_missing_entries=False, **place)
    load: Any = load_pipeline if config is None else AutoModel.from_pretrained
    return load(options.model, dtype=torch.float32, variant=options.variant, **place)
