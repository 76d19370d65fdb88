# SPDX-License-Identifier: Apache-2.0
"""A transformer with weights of 8 bits, through transformers' and diffusers' own arguments."""

from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TorchAoConfig

from hf_var import DIGITS_CHECKPOINT, VARPipeline, VARTransformer
from pipelines.tiny import seeded


torchao_quantization = pytest.importorskip("torchao.quantization")

LABELS = list(range(10))
# For each kind the largest error of the logits, as a share of their standard deviation.
KINDS = {"Int8WeightOnlyConfig": 0.02, "Int8DynamicActivationInt8WeightConfig": 0.05, "Float8WeightOnlyConfig": 0.08}


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(LABELS, generator=seeded(), output_type="pt")


def size_on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def full():
    return VARPipeline.from_pretrained(DIGITS_CHECKPOINT)


@pytest.fixture(params=KINDS)
def config(request):
    return TorchAoConfig(getattr(torchao_quantization, request.param)())


@torch.no_grad()
def test_a_quantized_transformer_draws_nearly_the_same(full, config, tmp_path):
    transformer = VARTransformer.from_pretrained(
        DIGITS_CHECKPOINT, subfolder="transformer", quantization_config=config
    )
    expected = draw(full)
    scale_inputs = full.vqvae.teacher_forcing(expected.codes)
    logits = full.transformer(torch.tensor(LABELS), scale_inputs).logits
    error = transformer(torch.tensor(LABELS), scale_inputs).logits - logits
    assert 0 < error.std() < KINDS[type(config.quant_type).__name__] * logits.std()

    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT, transformer=transformer)
    drawn = draw(pipe)
    assert (drawn.codes == expected.codes).float().mean() > 0.5
    assert (drawn.images - expected.images).abs().mean() < 0.1 * expected.images.std()

    pipe.save_pretrained(tmp_path)
    # All projections but the head have a byte per weight in place of four.
    assert size_on_disk(tmp_path / "transformer") < 0.35 * size_on_disk(Path(DIGITS_CHECKPOINT) / "transformer")
    assert torch.equal(draw(VARPipeline.from_pretrained(tmp_path)).codes, drawn.codes)


def test_quantized_weights_are_complete(tmp_path):
    config = TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig())
    part = {"subfolder": "transformer", "quantization_config": config}
    VARTransformer.from_pretrained(DIGITS_CHECKPOINT, **part).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        metadata = file.metadata()
    assert "layers.0.mlp.fc1._weight_qdata" in weights
    VARTransformer.from_pretrained(tmp_path)
    kept = {name: tensor for name, tensor in weights.items() if name != "head.weight"}
    save_file({**kept, "extra": torch.zeros(2)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"missing \['head.weight'\], left over \['extra'\]"):
        VARTransformer.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_pipeline_loads_with_a_quantized_transformer(full, config):
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT, quantization_config=mapping)
    assert type(pipe.transformer.layers[0].mlp.fc1.weight) is not torch.nn.Parameter
    # The codes' meaning is not rounded.
    for name, weight in full.vqvae.state_dict().items():
        assert torch.equal(pipe.vqvae.state_dict()[name], weight)
    assert (draw(pipe).codes == draw(full).codes).float().mean() > 0.5
