# SPDX-License-Identifier: Apache-2.0
"""The owner's other machine: loads everything that `push.py` published, by every route."""

import sys
from pathlib import Path

import torch
from common import assert_draws
from transformers import AutoConfig, AutoModel

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel


def pipelines(reference: Path) -> None:
    assert_draws(VARPipeline.from_pretrained("user/pipeline"), reference / "second.npz")
    assert_draws(VARPipeline.from_pretrained("user/pipeline", revision="v1.0"), reference / "first.npz")
    assert_draws(VARPipeline.from_pretrained("user/pipeline", revision="stable"), reference / "first.npz")
    assert_draws(VARPipeline.from_pretrained("user/private"), reference / "first.npz")


def models(reference: Path) -> None:
    for transformer, vqvae in (
        (VARTransformer.from_pretrained("user/transformer"), VQVAEModel.from_pretrained("user/vqvae")),
        (AutoModel.from_pretrained("user/transformer"), AutoModel.from_pretrained("user/vqvae")),
        (
            AutoModel.from_pretrained("user/pipeline", subfolder="transformer", revision="v1.0"),
            AutoModel.from_pretrained("user/pipeline", subfolder="vqvae", revision="v1.0"),
        ),
    ):
        assert (type(transformer), type(vqvae)) == (VARTransformer, VQVAEModel)
        assert_draws(VARPipeline(transformer, vqvae), reference / "first.npz")
        # A component that was loaded by itself stands in for the repository's own.
        pipe = VARPipeline.from_pretrained("user/pipeline", transformer=transformer, vqvae=vqvae)
        assert pipe.transformer is transformer
        assert_draws(pipe, reference / "first.npz")


def configs() -> None:
    for repo, subfolder, expected in (
        ("user/transformer", "", VARConfig),
        ("user/vqvae", "", VQVAEConfig),
        ("user/pipeline", "transformer", VARConfig),
        ("user/pipeline", "vqvae", VQVAEConfig),
    ):
        config = AutoConfig.from_pretrained(repo, subfolder=subfolder)
        assert type(config) is expected, (repo, subfolder, type(config))
        assert config.patch_nums == VARConfig(patch_nums=(1, 2, 4)).patch_nums
    assert AutoConfig.from_pretrained("user/transformer").id2label == {0: "cat", 1: "dog", 2: "owl"}


def dtypes(reference: Path) -> None:
    half = VARPipeline.from_pretrained("user/half", variant="fp16", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16
    assert_draws(half, reference / "half.npz")
    assert_draws(VARPipeline.from_pretrained("user/half"), reference / "first.npz")

    one = VARPipeline.from_pretrained("user/pipeline", dtype=torch.bfloat16)
    per_component = {"transformer": torch.bfloat16, "vqvae": torch.float32}
    each = VARPipeline.from_pretrained("user/pipeline", dtype=per_component)
    for pipe, vqvae_dtype in ((one, torch.bfloat16), (each, torch.float32)):
        assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
        assert pipe.vqvae.encoder.conv_in.weight.dtype == vqvae_dtype
        assert {parameter.dtype for parameter in pipe.vqvae.quantizer.parameters()} == {torch.float32}


if __name__ == "__main__":
    pipelines(Path(sys.argv[1]))
    models(Path(sys.argv[1]))
    configs()
    dtypes(Path(sys.argv[1]))
