# SPDX-License-Identifier: Apache-2.0
"""Pipelines to folders and back: whole, in other precisions, as variants and in shards."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from hf_var import VARPipeline
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae, seeded


LABELS = [0, 1, None, "Arctic owl"]


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(LABELS, generator=seeded(), output_type="pt")


def assert_draws_the_same(pipe, expected):
    output = draw(pipe)
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    return draw(make_pipeline())


def test_saved_pipeline_draws_the_same(folder, expected):
    pipe = VARPipeline.from_pretrained(folder)
    assert_draws_the_same(pipe, expected)
    assert not pipe.transformer.training
    assert not pipe.vqvae.training
    assert pipe.transformer.config.id2label[1] == "goldfish"


def test_configurations_survive(folder):
    pipe = VARPipeline.from_pretrained(folder)
    for name, component in make_pipeline().components.items():
        ours, theirs = component.config.to_dict(), getattr(pipe, name).config.to_dict()
        differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert differing <= {"architectures", "_name_or_path", "dtype"}, name


def test_saving_twice_writes_the_same_files(folder, tmp_path):
    VARPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for path in written:
        if path.suffix == ".safetensors":
            assert (tmp_path / path).read_bytes() == (folder / path).read_bytes(), path


def test_settings_travel_with_the_checkpoint(pipe, tmp_path):
    VARPipeline(**pipe.components, guidance_scale=6.0, top_p=0.5, temperature=1.5).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index.items() >= {"guidance_scale": 6.0, "top_p": 0.5, "temperature": 1.5}.items()
    expected = pipe(LABELS, guidance_scale=6.0, top_p=0.5, temperature=1.5, generator=seeded(), output_type="pt")
    for loaded in (VARPipeline.from_pretrained(tmp_path), DiffusionPipeline.from_pretrained(tmp_path)):
        assert_draws_the_same(loaded, expected)
        assert_draws_the_same(VARPipeline.from_pipe(loaded), expected)
        assert_draws_the_same(VARPipeline(**loaded.components, **loaded.parameters), expected)
    other = VARPipeline.from_pretrained(tmp_path, guidance_scale=1.0)
    assert (other.config.guidance_scale, other.config.top_p) == (1.0, 0.5)


def test_a_checkpoint_with_bad_settings_is_refused(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "top_p": 96}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"`top_p` must be in \[0, 1\].*got 96"):
        VARPipeline.from_pretrained(tmp_path)


def test_checkpoints_without_settings_get_the_defaults(expected, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    for name in ("guidance_scale", "top_p", "temperature"):
        del index[name]
    path.write_text(json.dumps(index), encoding="utf-8")
    assert_draws_the_same(VARPipeline.from_pretrained(tmp_path), expected)


def dtypes(module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize("loader", [VARPipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    ("dtype", "transformer", "vqvae"),
    [
        (None, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ({"transformer": torch.bfloat16, "vqvae": torch.float32}, torch.bfloat16, torch.float32),
        ({"transformer": torch.float16, "default": torch.bfloat16}, torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_precision_is_chosen_at_loading(folder, loader, dtype, transformer, vqvae):
    pipe = loader.from_pretrained(folder, dtype=dtype)
    assert dtypes(pipe.transformer) == {transformer}
    assert dtypes(pipe.vqvae.decoder) == dtypes(pipe.vqvae.encoder) == {vqvae}
    # Rounded code vectors would be other codes.
    assert dtypes(pipe.vqvae.quantizer) == {torch.float32}
    assert torch.equal(pipe.vqvae.quantizer.codebook.weight, make_vqvae().quantizer.codebook.weight)
    output = draw(pipe)
    assert output.images.isfinite().all()
    assert output.images.std() > 0.1


def test_half_precision_survives_saving(tmp_path):
    half = make_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path)
    pipe = VARPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert_draws_the_same(pipe, draw(half))
    size = (tmp_path / "transformer" / "model.safetensors").stat().st_size
    assert size < 2.2 * sum(parameter.numel() for parameter in half.transformer.parameters()) + 4096


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_variants_and_shards(tmp_path, max_shard_size):
    half = make_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    for component in ("transformer", "vqvae"):
        weights = [path.name for path in (tmp_path / component).glob("*.safetensors")]
        assert all(".fp16" in name for name in weights), weights
        assert (len(weights) > 1) == (max_shard_size == "20KB")
    for loader in (VARPipeline, DiffusionPipeline):
        assert_draws_the_same(loader.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16), draw(half))
    with pytest.raises((OSError, ValueError)):
        VARPipeline.from_pretrained(tmp_path)


def test_a_variant_beside_the_full_weights(expected, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    half = make_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    # The variants share one config.json, whose dtype, that of the last one saved, is transformers' default.
    assert_draws_the_same(VARPipeline.from_pretrained(tmp_path, dtype=torch.float32), expected)
    assert_draws_the_same(VARPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16), draw(half))


def test_shards_without_a_variant(expected, tmp_path):
    make_pipeline().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list((tmp_path / "transformer").glob("model-*.safetensors"))) > 1
    assert_draws_the_same(VARPipeline.from_pretrained(tmp_path), expected)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_maps(folder, expected, device_map):
    pipe = VARPipeline.from_pretrained(folder, device_map=device_map)
    assert_draws_the_same(pipe, expected)


@pytest.mark.parametrize("loader", [VARPipeline, DiffusionPipeline])
def test_components_may_be_passed(folder, loader):
    transformer, vqvae = make_transformer(seed=5), make_vqvae(seed=6)
    expected = draw(VARPipeline(transformer, vqvae))
    pipe = loader.from_pretrained(folder, transformer=transformer, vqvae=vqvae)
    assert pipe.transformer is transformer
    assert_draws_the_same(pipe, expected)
    pipe = loader.from_pretrained(folder, transformer=transformer)
    assert_draws_the_same(pipe, draw(VARPipeline(transformer, make_vqvae())))


def test_components_which_do_not_fit_are_refused_at_loading(folder):
    with pytest.raises(ValueError, match="`transformer` and `vqvae` do not belong together: codebook_size is 64 in"):
        VARPipeline.from_pretrained(folder, transformer=make_transformer(codebook_size=64))
    with pytest.raises(ValueError, match="`transformer` must be a model with a VARConfig, got NoneType"):
        VARPipeline.from_pretrained(folder, transformer=None)


def test_compiled_component(folder, expected, tmp_path):
    pipe = VARPipeline.from_pretrained(folder)
    pipe.transformer = torch.compile(pipe.transformer)  # wrapped, but nothing is compiled before it runs
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == ["hf_var", "VARTransformer"]
    assert_draws_the_same(VARPipeline.from_pretrained(tmp_path), expected)
    compiled = torch.compile(make_transformer())
    pipe = VARPipeline(compiled, make_vqvae())
    assert pipe.transformer is compiled
    assert pipe.get_label_ids("goldfish") == [1]
    assert VARPipeline.from_pretrained(folder, transformer=compiled).transformer is compiled
