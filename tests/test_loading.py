# SPDX-License-Identifier: Apache-2.0
"""A folder is loaded whole or refused: kinds of models, weights, pickles, indices and absurd sizes."""

import contextlib
import inspect
import json
import math
import os
import shutil
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.autoencoders import load_tokenizer
from hf_var.cli import main
from pipelines.tiny import make_pipeline


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a pipeline, with another library's model beside it."""
    folder = tmp_path_factory.mktemp("source")
    make_pipeline().save_pretrained(folder)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def pipeline(source, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(source, tmp_path / "pipeline")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_refused(load, *words):
    """`load` raises a `ValueError` of one line, soon."""
    begin = time.monotonic()
    with pytest.raises(ValueError) as error:
        load()
    assert time.monotonic() - begin < 20
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


# --- the kind of model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [VQVAEModel.from_pretrained, VQVAEConfig.from_pretrained, load_tokenizer])
@pytest.mark.parametrize("kind", ["transformer", "bert", "."])
def test_no_tokenizer(source, load, kind):
    words = {"transformer": ["hf_var'"], "bert": ["'bert'"], ".": ["holds a pipeline", "vqvae"]}[kind]
    assert_refused(lambda: load(source / kind), source / kind, *words)


@pytest.mark.parametrize("kind", ["vqvae", "bert", "."])
def test_no_transformer(source, kind):
    words = ["'transformer'"] if kind == "." else ["VARConfig needs 'hf_var'"]
    assert_refused(lambda: VARTransformer.from_pretrained(source / kind), source / kind, *words)


def test_a_tokenizer_is_loaded_from_a_folder_or_a_part(source):
    for model in (load_tokenizer(source / "vqvae"), load_tokenizer(source, subfolder="vqvae")):
        assert type(model) is VQVAEModel
        assert not model.training
    assert load_tokenizer(source / "vqvae", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["transformer", "bert", "."])
def test_tokenize_needs_a_tokenizer(source, kind, tmp_path, capsys):
    status = main(
        ["tokenize", "--data", str(tmp_path), "--vqvae", str(source / kind), "--output", str(tmp_path / "codes")]
    )
    message = capsys.readouterr().err.splitlines()
    assert status == 2
    assert [str(source / kind) in line for line in message if line.startswith("hf-var tokenize: ")] == [True]
    assert not (tmp_path / "codes").exists()


def test_a_pipeline_needs_all_weights(pipeline, capsys):
    change_weights(pipeline / "transformer", lambda weights: weights.pop("head.weight"))
    assert_refused(lambda: VARPipeline.from_pretrained(pipeline), "missing ['head.weight']", pipeline / "transformer")
    assert main(["generate", "--model", str(pipeline), "--output", str(pipeline / "out.png")]) == 2
    assert "head.weight" in capsys.readouterr().err


# --- the weights -----------------------------------------------------------------------------------------------------


def rename(weights):
    weights["head.kernel"] = weights.pop("head.weight")


CHANGES = {
    "missing ['head.bias']": lambda weights: weights.pop("head.bias"),
    "left over ['extra']": lambda weights: weights.update(extra=torch.zeros(2)),
    "missing ['head.weight'], left over ['head.kernel']": rename,
    "head.bias: F32 (3,) instead": lambda weights: weights.update({"head.bias": torch.zeros(3)}),
    "head.bias: F32 (0,) instead": lambda weights: weights.update({"head.bias": torch.zeros(0)}),
    "head.bias: I64": lambda weights: weights.update({"head.bias": weights["head.bias"].long()}),
    "infinite values, ['head.bias']": lambda weights: weights["head.bias"][1:2].fill_(torch.nan),
    "infinite values, ['head.weight']": lambda weights: weights["head.weight"][1].fill_(-torch.inf),
}


@pytest.mark.parametrize("auto", [False, True], ids=["own class", "AutoModel"])
@pytest.mark.parametrize("words", CHANGES)
def test_wrong_weights(pipeline, words, auto):
    folder = pipeline / "transformer"
    change_weights(folder, CHANGES[words])
    assert_refused(lambda: (AutoModel if auto else VARTransformer).from_pretrained(folder), folder, words)


def test_wrong_weights_in_shards(pipeline):
    folder = pipeline / "vqvae"
    model = VQVAEModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    VQVAEModel.from_pretrained(folder)
    name, *_ = load_file(shards[1])
    weights = load_file(shards[1])
    del weights[name]
    save_file(weights, shards[1], metadata={"format": "pt"})
    assert_refused(lambda: VQVAEModel.from_pretrained(folder), folder, f"missing ['{name}']")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(pipeline, share):
    path = pipeline / "transformer" / "model.safetensors"
    os.truncate(path, int(share * path.stat().st_size))
    assert_refused(lambda: VARPipeline.from_pretrained(pipeline), path, "truncated")


def test_other_shapes_pass_where_they_are_asked_for(pipeline):
    folder = pipeline / "transformer"
    change_weights(folder, lambda weights: weights.update({"head.bias": torch.zeros(3)}))
    model, report = VARTransformer.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, *_ in report["mismatched_keys"]] == ["head.bias"]
    assert model.head.bias.isfinite().all()
    change_weights(folder, lambda weights: weights.pop("head.weight"))
    load = lambda: VARTransformer.from_pretrained(folder, ignore_mismatched_sizes=True)  # noqa: E731
    assert_refused(load, "missing ['head.weight']")


def test_what_transformers_offers_is_kept(source, tmp_path):
    folder = source / "transformer"
    for device_map in ("meta", {"": "disk"}):
        # Nothing can be said about weights that are not there.
        model = VARTransformer.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
        assert {weight.device.type for weight in model.parameters()} == {"meta"}
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "dropout": 0.25}
    model, report = VARTransformer.from_pretrained(folder, device_map="cpu", output_loading_info=True, **options)
    assert (model.dtype, model.config._attn_implementation, model.config.dropout) == (torch.bfloat16, "eager", 0.25)
    assert not any(report.values())
    weights = VARTransformer.from_pretrained(folder).state_dict()
    config = VARConfig.from_pretrained(folder)
    model = VARTransformer.from_pretrained(None, config=config, state_dict=weights)
    assert torch.equal(model.head.weight, weights["head.weight"])
    del weights["head.weight"]
    with pytest.raises(ValueError, match="missing .'head.weight'"):
        VARTransformer.from_pretrained(None, config=config, state_dict=weights)


# --- pickles ---------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("is_payload", [False, True])
def test_pickles_are_not_read(pipeline, tmp_path, is_sharded, is_payload):
    folder, trace = pipeline / "vqvae", tmp_path / "executed"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if is_sharded else "pytorch_model.bin"
    torch.save({"extra": Payload(trace)} if is_payload else weights, folder / name)
    if is_sharded:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for load in (VQVAEModel.from_pretrained, AutoModel.from_pretrained, load_tokenizer):
        assert_refused(partial(load, folder), folder, "pickles (.bin) are not read")
    assert_refused(lambda: VQVAEModel.from_pretrained(folder, use_safetensors=False), "`use_safetensors` must be True")
    config = VQVAEConfig.from_pretrained(folder)
    assert_refused(lambda: VQVAEModel.from_pretrained(folder / name, config=config), folder / name)
    assert_refused(lambda: VQVAEModel.from_pretrained(folder / name), folder / name)
    with pytest.raises((ValueError, OSError)):
        VARPipeline.from_pretrained(pipeline)
    # Nor by an index of safetensors.
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    assert_refused(lambda: VQVAEModel.from_pretrained(folder), INDEX, name)
    assert not trace.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "transformers_weights"])
def test_a_configuration_chooses_no_code(pipeline, field):
    change_config(pipeline / "transformer", **{field: "user/attention"})
    for load in (VARTransformer.from_pretrained, AutoModel.from_pretrained):
        assert_refused(partial(load, pipeline / "transformer"), f"`{field}` must not be in config.json")


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["parent", "absolute", "below"])
def test_an_index_stays_in_its_folder(pipeline, place):
    folder = pipeline / "vqvae"
    weights = load_file(folder / "model.safetensors")
    (folder / "below").mkdir()
    shutil.copy(folder / "model.safetensors", pipeline / "outside.safetensors")
    shutil.move(folder / "model.safetensors", folder / "below" / "inside.safetensors")
    name = {
        "parent": "../outside.safetensors",
        "absolute": str(pipeline / "outside.safetensors"),
        "below": "below/inside.safetensors",
    }[place]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    assert_refused(lambda: VQVAEModel.from_pretrained(folder), folder / INDEX, name, "its own folder")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "{" * 9, "[" * 100_000, '{"weight_map": {}}', '{"weight_map": {"a": [1]}, "metadata": 0}'],
)
def test_a_broken_index(pipeline, content):
    folder = pipeline / "vqvae"
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(content)
    assert_refused(lambda: VQVAEModel.from_pretrained(folder), folder / INDEX, "weight_map")


# --- absurd sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("transformer", "hidden_size", 10**9),
        ("transformer", "num_hidden_layers", 10**7),
        ("transformer", "codebook_size", 10**12),
        ("transformer", "latent_channels", 2 * 10**5),
        ("transformer", "patch_nums", [1, 10**6]),
        ("transformer", "patch_nums", [1, 10**30]),
        ("transformer", "condition_channels", 10**9),
        ("transformer", "mlp_ratio", 1e15),
        ("transformer", "num_labels", 10**9),
        ("vqvae", "base_channels", 32 * 10**9),
        ("vqvae", "base_channels", 32 * 10**4),
        ("vqvae", "channel_multipliers", [1] * 10**5),
        ("vqvae", "num_res_blocks", 10**7),
        ("vqvae", "num_refinement_convs", 10**7),
        ("vqvae", "codebook_size", 10**12),
        ("vqvae", "latent_channels", 10**9),
        ("vqvae", "quant_conv_kernel_size", 10**9 + 1),
        ("vqvae", "patch_nums", [1, 10**6]),
        ("vqvae", "patch_nums", [1] * 10**5),
    ],
    ids=lambda value: str(value)[:24],
)
def test_absurd_sizes(pipeline, part, field, value):
    fields = {field: value}
    if field == "num_labels":
        fields |= {"id2label": None, "label2id": None}
    change_config(pipeline / part, **fields)
    model_class = {"vqvae": VQVAEModel, "transformer": VARTransformer}[part]
    for load in (model_class.from_pretrained, AutoModel.from_pretrained):
        assert_refused(partial(load, pipeline / part))


WRONG_VALUES = ["a", [1], -1, 1e308, math.inf]


@pytest.mark.parametrize("model_class", [VQVAEModel, VARTransformer])
def test_any_value_of_any_field_gives_a_model_or_an_error(pipeline, model_class):
    folder = pipeline / ("vqvae" if model_class is VQVAEModel else "transformer")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for field in {"dtype", "id2label", *inspect.get_annotations(model_class.config_class)}:
        for value in WRONG_VALUES:
            path.write_text(json.dumps({**fields, field: value}))
            with contextlib.suppress(ValueError):
                model_class.from_pretrained(folder)


def test_large_configurations_alone_are_possible():
    assert VARConfig(hidden_size=2**14, num_hidden_layers=256, codebook_size=2**20).hidden_size == 2**14
    assert VQVAEConfig(patch_nums=(1, 2**10), codebook_size=2**20).codebook_size == 2**20


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, "{", "\xff"])
def test_a_broken_configuration(pipeline, content):
    (pipeline / "vqvae" / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, OSError)):
        VQVAEModel.from_pretrained(pipeline / "vqvae")


# --- what is saved ---------------------------------------------------------------------------------------------------


def test_weights_have_the_mode_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        make_pipeline().save_pretrained(tmp_path / "pipeline")
        make_pipeline().vqvae.save_pretrained(tmp_path / "vqvae", max_shard_size="10kB")
    finally:
        os.umask(before)
    modes = {str(file): file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.*") if file.is_file()}
    assert len([name for name in modes if name.endswith(".safetensors")]) > 3
    assert set(modes.values()) == {0o640}
