# SPDX-License-Identifier: Apache-2.0
"""
Registration: other libraries load our folders with `import hf_var` and no more. Repositories on a Hub, which diffusers
checks differently, are in `hub/`.
"""

import inspect
import json
import subprocess
import sys
import textwrap

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from transformers import AutoConfig, AutoModel

import hf_var
from hf_var import (
    HierarchicalVQVAEConfig,
    HierarchicalVQVAEModel,
    VARConfig,
    VARPipeline,
    VARTransformer,
    VQVAEConfig,
    VQVAEModel,
)
from pipelines.tiny import LABEL_NAMES, make_pipeline, seeded


COMPONENTS = [("transformer", VARTransformer, VARConfig), ("vqvae", VQVAEModel, VQVAEConfig)]
CHANGED = "diffusers has changed: adapt `hf_var.registration`, then the range of versions in pyproject.toml."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline, and beside its files what it draws."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipe = make_pipeline()
    pipe.save_pretrained(folder)
    output = pipe([0, None, 3], generator=seeded(), output_type="pt")
    safetensors.torch.save_file({"codes": output.codes, "images": output.images}, folder / "drawing.safetensors")
    return folder


def run_in_fresh_interpreter(code: str, *arguments: object) -> str:
    program = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    process = subprocess.run(program, capture_output=True, text=True, timeout=290, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_model_index(folder):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {
        "_class_name": "VARPipeline",
        "transformer": ["hf_var", "VARTransformer"],
        "vqvae": ["hf_var", "VQVAEModel"],
        "guidance_scale": 2.5,
        "temperature": 1.0,
        "top_p": 0.96,
    }
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"model_index.json", "drawing.safetensors"} | {
        f"{name}/{file}" for name, _, _ in COMPONENTS for file in ("config.json", "model.safetensors")
    }


def test_configurations_name_their_classes(folder):
    for name, model_class, config_class in COMPONENTS:
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == config_class.model_type
        assert config["architectures"] == [model_class.__name__]
        assert "auto_map" not in config  # which would ask for a trust flag


def test_fresh_interpreter_knows_us_after_one_import(folder):
    """Everything a stranger's script does; nothing here may have been imported by another test."""
    run_in_fresh_interpreter(
        """
        import sys

        import diffusers
        import safetensors.torch
        import torch
        from diffusers import DiffusionPipeline
        from transformers import AutoConfig, AutoModel

        # Classes of diffusers' own would be lost.
        assert not hasattr(diffusers, "VARPipeline")
        assert not hasattr(diffusers.pipelines, "hf_var")

        import hf_var

        folder = sys.argv[1]
        drawing = safetensors.torch.load_file(f"{folder}/drawing.safetensors")

        def check(pipe):
            assert type(pipe) is hf_var.VARPipeline, type(pipe)
            pipe.set_progress_bar_config(disable=True)
            output = pipe([0, None, 3], generator=torch.Generator().manual_seed(0), output_type="pt")
            assert torch.equal(output.codes, drawing["codes"])
            assert torch.equal(output.images, drawing["images"])

        torch.set_num_threads(1)
        check(DiffusionPipeline.from_pretrained(folder))
        check(hf_var.VARPipeline.from_pretrained(folder))
        transformer = AutoModel.from_pretrained(folder, subfolder="transformer")
        vqvae = AutoModel.from_pretrained(folder, subfolder="vqvae")
        assert (type(transformer), type(vqvae)) == (hf_var.VARTransformer, hf_var.VQVAEModel)
        check(hf_var.VARPipeline(transformer, vqvae))
        check(DiffusionPipeline.from_pretrained(folder, transformer=transformer))
        assert type(AutoConfig.from_pretrained(f"{folder}/vqvae")) is hf_var.VQVAEConfig
        """,
        folder,
    )


@pytest.mark.parametrize(("name", "model_class", "config_class"), COMPONENTS)
def test_auto_classes(folder, name, model_class, config_class):
    assert type(AutoConfig.from_pretrained(folder, subfolder=name)) is config_class
    assert type(AutoConfig.from_pretrained(folder / name)) is config_class
    model = AutoModel.from_pretrained(folder, subfolder=name)
    assert type(model) is model_class
    expected = make_pipeline().components[name].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[key]) for key, weight in model.state_dict().items())
    half = AutoModel.from_pretrained(folder / name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert type(AutoModel.from_config(config_class.from_pretrained(folder, subfolder=name))) is model_class
    assert type(AutoConfig.for_model(config_class.model_type)) is config_class


def test_auto_classes_know_the_hierarchy(tmp_path):
    config = HierarchicalVQVAEConfig(image_size=8, base_channels=4, latent_channels=4, codebook_size=8)
    HierarchicalVQVAEModel(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is HierarchicalVQVAEConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is HierarchicalVQVAEModel
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["architectures"] == ["HierarchicalVQVAEModel"]
    # What follows from other fields is not stored.
    assert "patch_nums" not in saved


def test_label_names_are_loaded_as_integers(folder):
    assert AutoConfig.from_pretrained(folder, subfolder="transformer").id2label == LABEL_NAMES


def test_registering_twice_changes_nothing(folder):
    before = dict(pipeline_loading_utils.LOADABLE_CLASSES)
    hf_var.register()
    hf_var.register()
    assert before == pipeline_loading_utils.LOADABLE_CLASSES
    assert {"diffusers", "transformers"} <= before.keys()
    assert diffusers.pipelines.hf_var is hf_var
    assert diffusers.VARPipeline is VARPipeline
    assert type(DiffusionPipeline.from_pretrained(folder)) is VARPipeline


def test_contract_saving_asks_for_loadable_classes():
    """A library among these is written to model_index.json under its own name instead of a module's."""
    assert isinstance(getattr(pipeline_loading_utils, "LOADABLE_CLASSES", None), dict), CHANGED
    for name, component in make_pipeline().components.items():
        written = pipeline_loading_utils._fetch_class_library_tuple(component)
        assert written == ("hf_var", type(component).__name__), f"{name}: {written}. {CHANGED}"


def test_contract_loading_from_a_hub_asks_for_an_attribute_of_pipelines():
    """What is neither a loadable class, nor such an attribute, nor a file of the repository is refused there."""
    check = getattr(pipeline_loading_utils, "_get_custom_components_and_folders", None)
    assert check is not None, CHANGED
    expected = ["pretrained_model_name", "config_dict", "filenames", "variant_filenames", "variant"]
    assert list(inspect.signature(check).parameters)[: len(expected)] == expected, CHANGED
    config = {"_class_name": "VARPipeline", "transformer": ["hf_var", "VARTransformer"]}
    custom_components, folders = check("user/pipeline", config, ["transformer/config.json"])
    assert custom_components == {}, CHANGED
    assert folders == ["transformer"], CHANGED
    resolved = pipeline_loading_utils.get_class_obj_and_candidates(
        "hf_var", "VARTransformer", {}, diffusers.pipelines, is_pipeline_module=True
    )
    assert resolved[0] is VARTransformer, CHANGED


def test_contract_pipelines_are_attributes_of_diffusers():
    find = getattr(pipeline_loading_utils, "_get_pipeline_class", None)
    assert find is not None, CHANGED
    assert find(DiffusionPipeline, config={"_class_name": "VARPipeline"}) is VARPipeline, CHANGED
