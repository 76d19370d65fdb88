# SPDX-License-Identifier: Apache-2.0
"""Folders with the graphs of a model or pipeline, and with what a script needs to know beside them."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
from torch import nn

from ..autoencoders import TokenizerConfig
from ..modes import evaluation_mode
from ..pipelines import ARPipeline
from ..pipelines.base import PipelineBase
from ..pipelines.compilation import find_obstacle
from ..pipelines.options import resolve_sampling
from ..priors import RQTransformer
from ..priors.modeling_blocks import BlockTransformer
from ..ranges import OneOf, checked
from ..text_encoders import text_length
from .graphs import Graph, find_graphs, text_encoders


# What each format needs, and the ending of its files.
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
FORMATS = tuple(NEEDED)
DESCRIPTION = "export.json"
# A file of ONNX holds at most 2 GB: of larger models the weights lie beside it.
MAX_EMBEDDED = 1_500_000_000
# The graph with the large products.
QUANTIZED = "transformer"
# Fields of configurations and settings of sampling that scripts need.
TOKENIZER_FIELDS = ("image_size", "in_channels", "num_pixel_classes", "codebook_size", "latent_channels", "patch_nums")
PRIOR_FIELDS = ("block_lengths", "depth", "num_labels", "id2label", "learned_empty_text")
SAMPLING = ("guidance_scale", "guidance_rule", "top_k", "top_p", "temperature")


class _Module(nn.Module):
    """A function of modules and tensors as one module, which is what torch exports."""

    def __init__(self, graph: Graph):
        super().__init__()
        self.parts = nn.ModuleList(graph.modules)
        self.function = graph.function
        # Of the parts themselves the caller takes care.
        self.training = self.parts.training = False

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.parts, *inputs)


def export_model(model: Any, folder: str | PathLike, format: str = "onnx", int8: bool = False) -> Path:
    r"""
    Write a model or pipeline as graphs that run without torch.

    Args:
        model ([`VARPipeline`] or another pipeline of hf_var, or one of its models):
            In fp32 and on the CPU. It stays as it is.
        folder (`str` or `os.PathLike`): Folder to write, made if it does not exist.
        format (`str`, *optional*, defaults to `"onnx"`):
            `"onnx"` writes files `*.onnx`; `"openvino"` writes `*.xml` with their weights, `*.bin`.
        int8 (`bool`, *optional*, defaults to `False`):
            Whether the weights of the graph `transformer` have 8 bits, by onnxruntime's dynamic quantization: a smaller file
            that is faster on a CPU, and other codes.

    Returns:
        `pathlib.Path`: The folder. `export.json` in it lists the graphs with their inputs and outputs, the schedule, the
        labels and the defaults of sampling.

    Raises:
        `ValueError`: If the format is unknown or its packages are missing, there are no graphs for this model, its weights
            are not plain fp32 on the CPU, or `int8` goes with OpenVINO or a model without the graph `transformer`.
    """
    format = checked("format", format, Annotated[str, OneOf(*FORMATS)])
    graphs = find_graphs(model)
    int8 = checked("int8", int8, bool)
    if int8 and (format != "onnx" or QUANTIZED not in {graph.name for graph in graphs}):
        raise ValueError(f"`int8` needs `format` = 'onnx' and a model with the graph {QUANTIZED!r}, got {format!r}.")
    if missing := [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]:
        raise ValueError(f'`format` = {format!r} needs {", ".join(missing)}: pip install "hf_var[{format}]".')
    modules = graph_modules(graphs)
    for module in modules:
        _check_weights(module)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier(folder)
    with _exportable(modules), torch.no_grad():
        for graph in graphs:
            _WRITERS[format](export_program(graph), graph, folder)
    if int8:
        _quantize(folder / f"{QUANTIZED}.onnx")
    description = {"format": format, **describe(model, graphs)}
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(model, name, None)) is not None:
            tokenizer.save_pretrained(folder / name)
    return folder


def _remove_earlier(folder: Path) -> None:
    """Remove what an earlier export wrote, which would be taken for parts of this one."""
    if not (folder / DESCRIPTION).is_file():
        return
    for pattern in ("*.onnx", "*.onnx.data", "*.xml", "*.bin", "tokenizer*/*", DESCRIPTION):
        for file in folder.glob(pattern):
            file.unlink()


def export_program(graph: Graph) -> torch.export.ExportedProgram:
    """The graph as torch's own, with all sizes that vary."""
    names = {size for name in graph.inputs for size in graph.sizes(name).values()}
    sizes = {name: torch.export.Dim(name, max=graph.limits.get(name)) for name in names}
    varying = tuple({dim: sizes[size] for dim, size in graph.sizes(name).items()} for name in graph.inputs)
    return torch.export.export(_Module(graph), tuple(graph.inputs.values()), dynamic_shapes=(varying,))


def describe(model: Any, graphs: Sequence[Graph]) -> dict[str, Any]:
    """What a script needs beside the graphs, for JSON."""
    description: dict[str, Any] = {"class": type(model).__name__, "graphs": {}}
    for graph in graphs:
        inputs = {
            name: {
                "dtype": str(example.dtype).removeprefix("torch."),
                "shape": [graph.sizes(name).get(dim, size) for dim, size in enumerate(example.shape)],
            }
            for name, example in graph.inputs.items()
        }
        description["graphs"][graph.name] = {"inputs": inputs, "outputs": list(graph.outputs)}
    # The tokenizer of a pipeline comes before that of its condition.
    for module in reversed(graph_modules(graphs)):
        config = module.config
        names = TOKENIZER_FIELDS if isinstance(config, TokenizerConfig) else PRIOR_FIELDS
        description |= {name: getattr(config, name) for name in names if hasattr(config, name)}
    if isinstance(model, PipelineBase):
        settings = resolve_sampling(model.vqvae.config, model.config, {})
        description["sampling"] = {name: getattr(settings, name) for name in SAMPLING}
        if isinstance(model, ARPipeline):
            description["sampling"]["guidance_rule"] = "constant"
    if pairs := text_encoders(model):
        description["text_length"] = text_length(pairs)
    return description


def graph_modules(graphs: Sequence[Graph]) -> list[Any]:
    """The models of the graphs, each once."""
    return list(dict.fromkeys(module for graph in graphs for module in graph.modules))


def _check_weights(module: Any) -> None:
    obstacle = find_obstacle(module)
    dtypes = {str(parameter.dtype) for parameter in module.parameters()} - {"torch.float32"}
    if obstacle is None and dtypes:
        obstacle = f"its weights are of {', '.join(sorted(dtypes))}, load it with dtype=torch.float32"
    if obstacle is not None:
        raise ValueError(f"`model` must be in plain fp32 on the CPU, but of a {type(module).__name__} {obstacle}.")


@contextmanager
def _exportable(modules: Sequence[Any]) -> Iterator[None]:
    """The modules in evaluation mode, with torch's attention, whose mask is of truth values, and without slices or tiles."""
    with evaluation_mode(*modules), ExitStack() as stack:
        for module in modules:
            if isinstance(module, BlockTransformer | RQTransformer):
                stack.callback(module.set_attn_implementation, str(module.config._attn_implementation))
                module.set_attn_implementation("sdpa")
            for name in ("use_slicing", "use_tiling"):
                if getattr(module, name, False):
                    stack.callback(setattr, module, name, True)
                    setattr(module, name, False)
        yield


def _write_onnx(program: torch.export.ExportedProgram, graph: Graph, folder: Path) -> None:
    size = sum(weight.nbytes for weight in program.state_dict.values())
    torch.onnx.export(
        program,
        f=folder / f"{graph.name}.onnx",
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        external_data=size > MAX_EMBEDDED,
        verbose=False,
    )


def _quantize(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weights = path.with_suffix(".onnx.data")
    # Not in place: to a file of weights that is there, onnx appends.
    with TemporaryDirectory(dir=path.parent) as place:
        made = Path(place, path.name)
        quantize_dynamic(path, made, weight_type=QuantType.QInt8, use_external_data_format=weights.exists())
        weights.unlink(missing_ok=True)
        for file in Path(place).iterdir():
            file.replace(path.parent / file.name)


def _write_openvino(program: torch.export.ExportedProgram, graph: Graph, folder: Path) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    with TemporaryDirectory() as place:
        _write_onnx(program, graph, Path(place))
        model = openvino.convert_model(Path(place) / f"{graph.name}.onnx")
        openvino.save_model(model, folder / f"{graph.name}.xml", compress_to_fp16=False)


_WRITERS = {"onnx": _write_onnx, "openvino": _write_openvino}
