# SPDX-License-Identifier: Apache-2.0
"""`set_attention_backend`, which all models share with those of diffusers."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import hf_var
from hf_var.attention_backends import ATTENTION_BACKENDS, AttentionBackendMixin
from pipelines.texts import make_text_pipeline
from pipelines.tiny import make_pipeline, make_vqvae, seeded
from pipelines.tiny_ar import make_pixelcnn


BACKENDS = [("native", "sdpa"), ("_native_math", "eager"), ("flex", "flex_attention")]


@pytest.mark.parametrize(
    "name", [name for name in hf_var.__all__ if hasattr(getattr(hf_var, name), "save_pretrained")]
)
def test_all_models_have_the_methods(name):
    value = getattr(hf_var, name)
    if hasattr(value, "set_attn_implementation"):
        assert issubclass(value, AttentionBackendMixin)


@pytest.mark.parametrize(("backend", "implementation"), BACKENDS)
@pytest.mark.parametrize("make", [make_pipeline, make_text_pipeline])
def test_a_backend_is_the_implementation(make, backend, implementation):
    transformer = make().transformer
    transformer.set_attention_backend(backend)
    assert transformer.config._attn_implementation == implementation
    transformer.set_attention_backend(AttentionBackendName("_native_math"))
    assert transformer.config._attn_implementation == "eager"
    transformer.reset_attention_backend()
    assert transformer.config._attn_implementation == "sdpa"


def test_the_backend_is_used():
    pipe = make_pipeline()
    by_default = pipe([0, 3], generator=seeded(), output_type="pt")
    pipe.transformer.set_attention_backend("_native_math")
    by_products = pipe([0, 3], generator=seeded(), output_type="pt")
    assert torch.equal(by_default.codes, by_products.codes)
    torch.testing.assert_close(by_products.images, by_default.images)


def test_models_without_a_choice_compute_as_before():
    vqvae, pixels = make_vqvae(), torch.rand(1, 3, 8, 8, generator=seeded()) * 2 - 1
    expected = vqvae.encode(pixels).codes
    for model in (vqvae, make_pixelcnn()):
        for backend in ATTENTION_BACKENDS:
            model.set_attention_backend(backend)
        model.reset_attention_backend()
        assert model.config._attn_implementation == "eager"
    assert torch.equal(vqvae.encode(pixels).codes, expected)


@pytest.mark.parametrize("backend", ["sdpa", "sage", "flash_varlen", "", None, 1, ["native"]])
@pytest.mark.parametrize("make", [make_vqvae, lambda: make_pipeline().transformer])
def test_an_unknown_backend_is_refused(make, backend):
    with pytest.raises(ValueError, match="`backend` must be one of 'native', '_native_math', 'flex', 'flash', "):
        make().set_attention_backend(backend)
