# SPDX-License-Identifier: Apache-2.0
"""Graphs in files: what onnxruntime and OpenVINO make of them is what torch makes of the models."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from export.drawing import EXAMPLE, assert_close, draw_onnx, noise_of, without_rule
from export.models import MODELS, PIPELINES
from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT, VARPipeline, VARTextToImagePipeline
from hf_var.cli import main
from hf_var.export import export_model, writing
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae, seeded


pytest.importorskip("onnxruntime")
LABELS = [3, 1, 4, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The digits, exported by the command."""
    output = tmp_path_factory.mktemp("export") / "digits"
    assert main(["export", "--format", "onnx", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def graphs(folder):
    return draw_onnx.Graphs(folder)


@pytest.fixture(scope="module")
def pipe():
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(graphs, labels, seed=0, prompts=None, **settings):
    """Codes by the example's loop, with the noise that a pipeline of this seed draws."""
    sampling = without_rule(graphs.description["sampling"]) | settings
    names = None if prompts else ["none" if label is None else label for label in labels]
    condition = draw_onnx.condition_of(graphs, names, prompts, sampling["guidance_scale"] != 1)
    return draw_onnx.draw(graphs, condition, noise_of(seeded(seed)), **sampling)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"top_k": 1},
        {"guidance_scale": 4.0, "top_k": 20, "top_p": 0.8, "temperature": 1.5},
    ],
    ids=["defaults", "no guidance", "greedy", "all"],
)
def test_the_codes_are_those_of_the_pipeline(graphs, pipe, settings):
    expected = pipe(LABELS, generator=seeded(), output_type="pt", **settings)
    per_scale = {name: value if name == "guidance_scale" else [value] * 5 for name, value in settings.items()}
    codes = drawn(graphs, LABELS, **per_scale)
    np.testing.assert_array_equal(codes, expected.codes.numpy())
    assert_close(graphs("decode", codes=codes)["sample"], expected.images.numpy() * 2 - 1)


def test_one_image(graphs, pipe):
    expected = pipe("7", generator=seeded(), output_type="latent").codes
    np.testing.assert_array_equal(drawn(graphs, ["7"]), expected.numpy())


def test_all_tokens_in_one_call_are_the_forward_of_training(graphs, pipe):
    codes = torch.randint(128, (3, 31), generator=seeded())
    labels = np.array([0, 10, 9])
    with torch.no_grad():
        scale_inputs = pipe.vqvae.teacher_forcing(codes)
        expected = pipe.transformer(torch.from_numpy(labels), scale_inputs).logits
    found = graphs("scale_inputs", codes=codes.numpy())["scale_inputs"]
    assert_close(found, scale_inputs.numpy())
    past = dict.fromkeys(("past_keys", "past_values"), np.zeros((4, 3, 2, 0, 64), np.float32))
    condition = graphs("condition", class_labels=labels)
    outputs = graphs("transformer", **condition, **past, scale_inputs=found, positions=np.arange(31))
    assert_close(outputs["logits"], expected.numpy())
    assert outputs["keys"].shape == (4, 3, 2, 31, 64)


def test_the_codes_of_images(graphs, pipe):
    pixels = pipe(LABELS, generator=seeded(), output_type="pt").images * 2 - 1
    found = graphs("encode", pixel_values=pixels.numpy())["codes"]
    np.testing.assert_array_equal(found, pipe.vqvae.encode(pixels).codes.numpy())


def test_the_example_draws_without_torch(folder, tmp_path):
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'diffusers', 'hf_var')))"
    run = (
        f"{blocked}; sys.argv[0] = 'draw_onnx.py'; import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    for output in ("one.png", "two.png"):
        options = ["--class-labels", "3", "1", "none", "--seed", "5", "--top-k", "100", "--output", output]
        subprocess.run([sys.executable, "-c", run, str(folder), *options], cwd=tmp_path, check=True)
    one, two = (Image.open(tmp_path / name) for name in ("one.png", "two.png"))
    assert one.size == (48, 16)
    assert one.tobytes() == two.tobytes()
    assert len(set(one.tobytes())) > 50


def test_a_model_and_its_options_stay_as_they_are(tmp_path):
    model = make_vqvae().train()
    model.enable_slicing()
    folder = export_model(model, tmp_path / "vqvae")
    assert model.training
    assert model.use_slicing
    pixels = torch.rand(3, 3, 8, 8, generator=seeded()) * 2 - 1
    codes = draw_onnx.Graphs(folder)("encode", pixel_values=pixels.numpy())["codes"]
    np.testing.assert_array_equal(codes, model.eval().encode(pixels).codes.numpy())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*PIPELINES, *MODELS])
def test_everything_is_written(kind, tmp_path):
    model = PIPELINES[kind]() if kind in PIPELINES else MODELS[kind][0]()
    graphs = draw_onnx.Graphs(export_model(model, tmp_path))
    for name, described in graphs.description["graphs"].items():
        sizes = {"batch": 3, "text": 4, "tokens": 1, "past": 0}
        inputs = {
            each: np.ones([sizes.get(size, size) for size in entry["shape"]], entry["dtype"])
            for each, entry in described["inputs"].items()
        }
        assert len(graphs(name, **inputs)) == len(described["outputs"])


@pytest.mark.slow
def test_emoji(tmp_path):
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    graphs = draw_onnx.Graphs(export_model(pipe, tmp_path))
    prompts = ["a red heart", "a blue apple", "a cat"]
    expected = pipe(prompts, generator=seeded(), output_type="latent").codes
    np.testing.assert_array_equal(drawn(graphs, None, prompts=prompts), expected.numpy())


def test_openvino(tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs OpenVINO, which is large")
    pipe = make_pipeline({"num_hidden_layers": 1})
    graphs = draw_onnx.Graphs(export_model(pipe, tmp_path, format="openvino"))
    assert (tmp_path / "transformer.bin").exists()
    # On processors with bf16 it would round by default.
    core, precision = openvino.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    for name in graphs.description["graphs"]:
        graphs.sessions[name] = OpenVINO(core.compile_model(tmp_path / f"{name}.xml", "CPU", precision))
    expected = pipe([3, 1, None], generator=seeded(), output_type="pt")
    codes = drawn(graphs, [3, 1, None])
    np.testing.assert_array_equal(codes, expected.codes.numpy())
    assert_close(graphs("decode", codes=codes)["sample"], expected.images.numpy() * 2 - 1)


def test_int8(tmp_path):
    import onnx

    model = make_transformer(num_hidden_layers=1)
    folder = export_model(model, tmp_path, int8=True)
    weights = onnx.load(folder / "transformer.onnx").graph.initializer
    assert sum(weight.data_type == onnx.TensorProto.INT8 for weight in weights) >= 7
    graphs, inputs = draw_onnx.Graphs(folder), torch.randn(2, 20, 4, generator=seeded())
    past = dict.fromkeys(("past_keys", "past_values"), np.zeros((1, 2, 2, 0, 16), np.float32))
    condition = graphs("condition", class_labels=np.array([3, 5]))
    found = graphs("transformer", **condition, **past, scale_inputs=inputs.numpy(), positions=np.arange(21))["logits"]
    with torch.no_grad():
        expected = model(torch.tensor([3, 5]), inputs).logits.numpy()
    assert 0 < np.abs(found - expected).std() < 0.1 * expected.std()


def test_int8_of_weights_that_lie_beside_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "MAX_EMBEDDED", 0)
    model = make_transformer(num_hidden_layers=1)
    whole = sum(file.stat().st_size for file in export_model(model, tmp_path).glob("transformer.onnx*"))
    (tmp_path / "decode.onnx").write_bytes(b"of an earlier export")
    folder = export_model(model, tmp_path, int8=True)
    assert sum(file.stat().st_size for file in folder.glob("transformer.onnx*")) < 0.8 * whole
    assert not (folder / "decode.onnx").exists()
    graphs = draw_onnx.Graphs(folder)
    assert graphs("condition", class_labels=np.array([3]))["condition"].shape == (1, 32)


class OpenVINO:
    """A model of OpenVINO with the interface of onnxruntime's."""

    def __init__(self, model):
        self.model = model

    def run(self, _, inputs):
        return list(self.model(inputs).values())


# --- what is refused -------------------------------------------------------------------------------------------------


def refuse(model, match, **options):
    with pytest.raises(ValueError, match=match):
        export_model(model, "never", **options)


def test_another_format(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuse(make_vqvae(), "`format`.*onnx", format="coreml")
    refuse(torch.nn.Linear(1, 1), "`model` must be a pipeline of hf_var.*Linear")
    refuse(make_transformer().bfloat16(), "VARTransformer.*bfloat16.*dtype=torch.float32")
    refuse(make_vqvae(), "`int8`.*transformer", int8=True)
    refuse(make_transformer(), "`int8`.*onnx.*openvino", int8=True, format="openvino")
    refuse(make_transformer().to("meta"), "VARTransformer.*not all on the CPU")
    assert not list(tmp_path.iterdir())


def test_missing_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else name)
    refuse(make_vqvae(), r"needs onnxscript: pip install \"hf_var\[onnx\]\"")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--format", "coreml"], "--format"),
        (["--model", "no/such"], "no/such"),
        (["--model", DIGITS_CHECKPOINT, "--output", __file__], "--output"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, told, tmp_path, capsys):
    assert main(["export", "--output", str(tmp_path / "out"), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
