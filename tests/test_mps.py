# SPDX-License-Identifier: Apache-2.0
"""
What runs on Apple's GPUs (MPS), found without one: calls of all models and pipelines use no operator without a kernel for
MPS, no float64 and no complex numbers. Which operators have one is written in torch's own table of operators.
"""

from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from export.models import MODELS, PIPELINES
from hf_var import VARImg2ImgPipeline, VARInpaintPipeline, VARTextImg2ImgPipeline, VARTextInpaintPipeline
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, make_transformer, seeded


TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# Kernels of these keys are made of other operators, on any device.
MADE_OF_OTHERS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
NUMBERS = {torch.float64, torch.complex32, torch.complex64, torch.complex128}


def read_table() -> dict[str, dict]:
    """The entries of torch's operators, by name and overload."""
    entries = yaml.load(TABLE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


@pytest.fixture(scope="module")
def table():
    return read_table()


def runs_on_mps(name: str, table: dict[str, dict]) -> bool:
    """Whether the operator `name` has a kernel for MPS."""
    entry = table[name]
    if "structured_delegate" in entry:
        return runs_on_mps(entry["structured_delegate"], table)
    if "dispatch" not in entry:
        return True
    keys = {key.strip() for keys in entry["dispatch"] for key in keys.split(",")}
    return "MPS" in keys or bool(keys & set(MADE_OF_OTHERS))


class Trace(TorchDispatchMode):
    """Collects the operators that run, and the types of what they return."""

    def __init__(self):
        super().__init__()
        self.names, self.dtypes = set(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.namespace == "aten":
            overload = operator._overloadname
            self.names.add(operator.__name__.removesuffix(".default") if overload == "default" else operator.__name__)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.dtypes.add(value.dtype)
        return result


def check(call, table):
    # The fused attention of CPUs is their own; MPS has another one.
    with Trace() as trace, sdpa_kernel(SDPBackend.MATH):
        call()
    assert len(trace.names) > 10
    assert sorted(name for name in trace.names if not runs_on_mps(name, table)) == []
    assert trace.dtypes & NUMBERS == set()


@pytest.mark.parametrize("kind", MODELS)
def test_models_run_and_train(kind, table):
    make, make_inputs = MODELS[kind]
    model = make()
    inputs = make_inputs(model, 2)
    if "codes" in inputs and "labels" not in inputs:
        inputs["labels"] = inputs["codes"]

    def call():
        model(**inputs)
        output = model.train()(**inputs)
        loss = output.loss if (sample := getattr(output, "sample", None)) is None else output.loss + sample.mean()
        loss.backward()

    check(call, table)


def labels_call(pipe, **options):
    return lambda: pipe(class_labels=[0, 1], generator=seeded(), output_type="pt", **options)


def text_call(pipe, **options):
    return lambda: pipe(prompt=["a red cat", "dark"], generator=seeded(), output_type="pt", **options)


def edits():
    image = torch.rand(1, 3, 8, 8, generator=seeded())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    return {"image": image, "mask_image": mask}, {"image": image, "strength": 0.6}


CALLS = {
    "classes": lambda: labels_call(make_pipeline()),
    "smooth": lambda: labels_call(make_pipeline(), smooth=True, guidance_scale=1.0),
    "refiner": lambda: labels_call(make_pipeline(), refiner=make_transformer(2), refiner_start=1),
    "texts": lambda: text_call(make_text_pipeline(), smooth=True),
    "inpaint": lambda: labels_call(VARInpaintPipeline.from_pipe(make_pipeline()), **edits()[0]),
    "img2img": lambda: labels_call(VARImg2ImgPipeline.from_pipe(make_pipeline()), **edits()[1]),
    "text inpaint": lambda: text_call(VARTextInpaintPipeline.from_pipe(make_text_pipeline()), **edits()[0]),
    "text img2img": lambda: text_call(VARTextImg2ImgPipeline.from_pipe(make_text_pipeline()), **edits()[1]),
    "levels": lambda: labels_call(PIPELINES["levels"]()),
    "pixelcnn": lambda: labels_call(PIPELINES["pixelcnn"]()),
    "stacks": lambda: labels_call(PIPELINES["stacks"]()),
    "raster": lambda: labels_call(PIPELINES["raster"]()),
}


@pytest.mark.parametrize("kind", CALLS)
def test_pipelines_run(kind, table):
    check(CALLS[kind](), table)


def test_what_mps_lacks_is_found(table):
    matrix = torch.rand(3, 3)
    for call in (lambda: torch.linalg.eigvals(matrix), lambda: torch.rand(3).double(), lambda: torch.fft.fft(matrix)):
        with Trace() as trace:
            call()
        lacking = [name for name in trace.names if not runs_on_mps(name, table)]
        assert lacking or trace.dtypes & NUMBERS
    assert not runs_on_mps("linalg_eig", table)
    assert runs_on_mps("mm", table)
    assert runs_on_mps("upsample_bicubic2d", table)
    assert runs_on_mps("_scaled_dot_product_attention_math_for_mps", table)
