# SPDX-License-Identifier: Apache-2.0
"""The house rules that can be read off the sources: who imports whom, sizes of files, no prints, documented names."""

import ast
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_var


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "hf_var"
SOURCES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 400
OFFLOAD_DECORATOR = "diffusers.utils.accelerate_utils.apply_forward_hook"
AVERAGE = "diffusers.training_utils.EMAModel"
# The model without a quantizer, which is diffusers' own.
AUTOENCODER_KL = "diffusers.AutoencoderKL"
POSTERIOR = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
RUN_CONFIG = "hf_var.training.run.RunConfig"
IMPORT_DECORATOR = "from diffusers.utils.accelerate_utils import apply_forward_hook"
STAGES = {"attention_backends", "scales", "ranges", "tensor_checks", "fingerprints", "image_decoding"}
STAGES |= {"autoencoders", "priors"}
MODEL_PARTS = {"attention_backends", "scales", "ranges", "tensor_checks", "loading"}
LIBRARY = STAGES | {"adapter_files", "pipelines", "modular", "registration", "conversion", "scoring"}
CORE = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL"}
FLOOR = {"data", "metrics", "hub"}
READ = {"accelerate", "datasets", "torchvision"}
READ |= {"fsspec", "pyarrow"}  # datasets always brings these, and yaml

# What each part of the package may import beside itself and the standard library: other parts, then other packages.
# A part is a folder or module directly in src/hf_var. Accelerate, though always installed, is not for the models and their
# pipelines.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "scales": ({"ranges"}, set()),
    "ranges": (set(), set()),
    "schedules": ({"scales", "ranges"}, set()),
    "lazy": (set(), set()),
    "plain_options": (set(), set()),
    "attention_backends": (set(), set()),
    "modes": (set(), {"torch"}),
    "precision": (set(), {"torch"}),
    "compatibility": (set(), {"transformers", "peft"}),
    "downloads": (set(), {"torch"}),
    "files": (set(), set()),
    "code_files": (set(), set()),
    "fingerprints": (set(), {"torch"}),
    "progress": (set(), {"tqdm"}),
    "text_encoders": ({"fingerprints"}, {"torch", "transformers"}),
    "image_decoding": ({"ranges"}, {"torch", "numpy", "PIL"}),
    "loading": ({"weight_files"}, {"torch", "transformers"}),
    "tensor_checks": (set(), {"torch"}),
    "autoencoders": (MODEL_PARTS, {"torch", "transformers", OFFLOAD_DECORATOR}),
    "priors": (MODEL_PARTS, {"torch", "transformers"}),
    # PEFT is an extra, imported when adapters are loaded.
    "adapter_files": ({"priors", "weight_files"}, CORE | {"peft"}),
    "pipelines": (
        STAGES
        | {
            "adapter_files",
            "code_files",
            "image_decoding",
            "modes",
            "precision",
            "compatibility",
            "plain_options",
            "text_encoders",
        },
        CORE | {"diffusers", "peft"},
    ),
    "modular": (STAGES | {"modes", "pipelines", "text_encoders"}, CORE | {"diffusers"}),
    "registration": (STAGES | {"modular", "pipelines"}, {"transformers", "diffusers"}),
    "weight_files": (set(), {"torch", "safetensors"}),
    "conversion": (STAGES | {"schedules", "weight_files"}, CORE),
    "scoring": (STAGES | {"pipelines"}, CORE | {"diffusers"}),
    # What the formats need is an extra, imported when they are written.
    "export": (STAGES | {"pipelines", "modes", "text_encoders"}, CORE | {"onnxruntime", "openvino"}),
    # Images and codes in, measures, and what is published: none knows a training, its arguments or an evaluation.
    "metrics": (
        STAGES | {"modes", "precision", "downloads", "weight_files"},
        CORE | {"accelerate", "lpips", "matplotlib", "torch_fidelity", "torchmetrics", "torchvision", AUTOENCODER_KL},
    ),
    "hub": (STAGES | {"files", "metrics"}, CORE | {"yaml", AUTOENCODER_KL}),
    "data": (
        {
            "scales",
            "ranges",
            "lazy",
            "files",
            "fingerprints",
            "progress",
            "image_decoding",
            "autoencoders",
            "hub",
            "text_encoders",
        },
        # Ray is an extra, imported by the engine that is named after it.
        CORE | READ | {"ray"},
    ),
    # Neither imports the other.
    "training": (
        STAGES
        | FLOOR
        | {
            "adapter_files",
            "files",
            "modes",
            "precision",
            "progress",
            "compatibility",
            "weight_files",
            "text_encoders",
        },
        CORE | {"accelerate", "datasets", "matplotlib", "peft", "sklearn", AVERAGE, AUTOENCODER_KL, POSTERIOR},
    ),
    "evaluation": (
        STAGES | FLOOR | {"__init__", "downloads", "files", "fingerprints", "pipelines", "plain_options", "progress"},
        CORE | {"accelerate", "datasets", "matplotlib", "pyarrow"},
    ),
    "serving": ({"pipelines"}, {"vllm_omni.diffusion.registry"}),
    "public": (LIBRARY, set()),
    "__init__": ({"public", "lazy"}, set()),
    "__main__": ({"cli"}, set()),
    "app": ({"__init__", "pipelines", "scoring", "image_decoding"}, {"torch", "PIL", "gradio"}),
    # Its commands import what takes long to import, or comes with an extra, when they are called.
    "cli": (
        LIBRARY
        | {
            "__init__",
            "app",
            "schedules",
            "image_decoding",
            "plain_options",
            "data",
            "evaluation",
            "export",
            "hub",
            "text_encoders",
        },
        CORE | {"diffusers", "accelerate", "yaml"},
    ),
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_names(source: str, package: str) -> Iterator[str]:
    """
    Yields the full dotted name of everything that `source`, a module of `package`, imports, wherever in the module
    the import stands: `from ..scales import bounds` in `hf_var.priors` is `hf_var.scales.bounds`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base.rstrip('.')}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            target = node.args[0]
            # A computed name cannot be checked, so it counts as an import of something unknown.
            yield target.value if isinstance(target, ast.Constant) else ast.unparse(target)


def violations(source: str, path: Path) -> list[str]:
    """Names that `source`, standing at `path`, imports against the table."""
    part = part_of(path)
    parts, packages = MAY_IMPORT[part]
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    forbidden = []
    for name in imported_names(source, package):
        head, _, rest = name.partition(".")
        if head == "hf_var":
            # What is not a part of its own is a name that the package's __init__ defines.
            target = rest.partition(".")[0]
            allowed = (target if target in MAY_IMPORT else "__init__") in parts | {part}
        else:
            allowed = head in sys.stdlib_module_names or any(
                name == entry or name.startswith(entry + ".") for entry in packages
            )
        if not allowed:
            forbidden.append(name)
    return forbidden


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_downwards(path):
    assert part_of(path) in MAY_IMPORT, f"{relative(path)} is a new part: say in MAY_IMPORT where it stands"
    assert violations(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("module", "statement", "forbidden"),
    [
        ("autoencoders/layers.py", "from ..priors import VARConfig", "hf_var.priors.VARConfig"),
        ("autoencoders/layers.py", "from .. import priors", "hf_var.priors"),
        ("autoencoders/layers.py", "from hf_var import VARConfig", "hf_var.VARConfig"),
        ("autoencoders/layers.py", "import numpy as np", "numpy"),
        ("autoencoders/layers.py", "from diffusers.utils import logging", "diffusers.utils.logging"),
        ("priors/layers.py", IMPORT_DECORATOR, OFFLOAD_DECORATOR),
        ("priors/layers.py", "import torchvision", "torchvision"),
        ("pipelines/sampling.py", "def late():\n    from ..training import losses", "hf_var.training.losses"),
        ("pipelines/sampling.py", "import importlib\nimportlib.import_module('hf_var.cli')", "hf_var.cli"),
        ("pipelines/sampling.py", "import accelerate.utils", "accelerate.utils"),
        ("pipelines/sampling.py", "from ..modular import VARScaleLoop", "hf_var.modular.VARScaleLoop"),
        ("conversion/common.py", "from ..cli import main", "hf_var.cli.main"),
        ("priors/layers.py", "from ..autoencoders import VQVAEModel", "hf_var.autoencoders.VQVAEModel"),
        ("data/images.py", "from ..training.run import RunConfig", RUN_CONFIG),
        ("data/codes.py", "from ..priors import VARTransformer", "hf_var.priors.VARTransformer"),
        ("metrics/likelihood.py", "from ..training import prior_inputs", "hf_var.training.prior_inputs"),
        ("metrics/reconstruction.py", "from ..data import ValidationBatches", "hf_var.data.ValidationBatches"),
        ("hub/cards.py", "from hf_var.training.run import RunConfig", RUN_CONFIG),
        ("hub/cards.py", "from ..pipelines import VARPipeline", "hf_var.pipelines.VARPipeline"),
        ("evaluation/run.py", "from ..training.run import RunConfig", RUN_CONFIG),
        ("training/run.py", "from ..evaluation import report", "hf_var.evaluation.report"),
        (
            "training/run.py",
            "from diffusers.optimization import get_scheduler",
            "diffusers.optimization.get_scheduler",
        ),
        ("__init__.py", "from .training import losses", "hf_var.training.losses"),
        ("cli/jobs.py", "import datasets", "datasets"),
    ],
)
def test_a_forbidden_import_is_found(module, statement, forbidden):
    assert violations(statement, PACKAGE / module) == [forbidden]


def test_allowed_imports_pass():
    statements = ["import math", "from torch import nn", "from ..scales import bounds", "from . import quantization"]
    assert violations("\n".join([*statements, IMPORT_DECORATOR]), PACKAGE / "autoencoders" / "layers.py") == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_is_short_licensed_and_silent(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    if part_of(path) != "cli":
        calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_no_folder_is_named_like_a_pipeline_of_diffusers():
    # diffusers would write such a folder's name into model_index.json and look for the class among its own.
    (diffusers,) = importlib.util.find_spec("diffusers").submodule_search_locations
    taken = {path.name for path in Path(diffusers, "pipelines").iterdir() if path.is_dir()}
    assert "stable_diffusion" in taken
    assert not taken & {path.name for path in PACKAGE.rglob("*") if path.is_dir()} - {"__pycache__"}


@pytest.mark.parametrize("name", hf_var.__all__)
def test_a_public_name_is_documented(name):
    value = getattr(hf_var, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A class's own docstring, which is not inherited; what @dataclass writes in its place is only the signature.
        documentation = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert documentation, f"{name} has no docstring"
        assert not documentation.startswith(f"{name}("), f"{name} has no docstring but its signature"
