# SPDX-License-Identifier: Apache-2.0
"""VAR transformers that predict one token after the other, in `ARPipeline`."""

import pytest
import torch
from diffusers import DiffusionPipeline

from hf_var import ARPipeline, VARPipeline
from hf_var.scoring import log_likelihood
from pipelines.stacked import make_raster
from pipelines.tiny import make_transformer, make_vqvae, seeded


@pytest.fixture(params=[(4,), (1, 2, 4)], ids=["one_scale", "scales"])
def pipe(request):
    return make_raster(request.param)


def likely(pipe, labels, codes):
    """The most likely codes after those before them, all in one pass."""
    inputs = pipe.vqvae.teacher_forcing(codes, is_raster=True)
    with torch.no_grad():
        return pipe.prior(torch.tensor(labels), inputs).logits


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, lambda k, num_scales: 2.0 if k == 0 else 1.0])
def test_the_most_likely_tokens_are_those_of_teacher_forcing(pipe, guidance_scale):
    codes = pipe([0, 3], top_k=1, guidance_scale=guidance_scale, output_type="latent").codes
    logits, unconditional = (likely(pipe, labels, codes) for labels in ([0, 3], [-1, -1]))
    lengths = pipe.vqvae.config.scale_lengths
    weights = [guidance_scale(k, 1) if callable(guidance_scale) else guidance_scale for k in range(len(lengths))]
    weight = torch.tensor(weights).repeat_interleave(torch.tensor(lengths))[:, None]
    guided = unconditional + weight * (logits - unconditional)
    assert torch.equal(guided.argmax(dim=-1), codes)


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe([1, 2, None], generator=[seeded(seed) for seed in range(3)], output_type="pt")
    for label, seed in ((1, 0), (2, 1), (None, 2)):
        alone = pipe(label, generator=[seeded(seed)], output_type="pt")
        assert torch.equal(alone.codes[0], together.codes[seed])
        torch.testing.assert_close(alone.images[0], together.images[seed])
    assert len(together.codes.unique()) > 3


def test_codes_are_those_of_the_images(pipe):
    output = pipe([4], generator=seeded(), output_type="latent")
    assert torch.equal(output.images, pipe.vqvae.latents(output.codes))


def test_scores_are_of_the_same_order(pipe):
    codes = pipe([0, 3], generator=seeded(), output_type="latent").codes
    expected = likely(pipe, [0, 3], codes).log_softmax(dim=-1).gather(2, codes[..., None])[..., 0].sum(dim=1)
    scores = log_likelihood(pipe, codes=codes, class_labels=[0, 3])
    torch.testing.assert_close(scores.total.float(), expected, rtol=1e-5, atol=1e-4)


def test_completion_and_rows(pipe):
    rows, sizes = [], pipe.vqvae.config.scale_sizes
    whole = pipe([0, 1], top_k=1, callback_on_step_end=lambda pipe, *call: rows.append(call[:2])).codes
    assert rows == list(enumerate(k for k, (height, _) in enumerate(sizes) for _ in range(height)))
    half = len(rows) // 2
    assert torch.equal(pipe([0, 1], codes=whole, num_given_rows=half, top_k=1).codes, whole)
    others = pipe([2, 3], codes=whole, num_given_rows=half, top_k=1).codes
    ends = torch.tensor([width for height, width in sizes for _ in range(height)]).cumsum(0)
    assert torch.equal(others[:, : ends[half - 1]], whole[:, : ends[half - 1]])
    assert not torch.equal(others, whole)


def test_embeddings_in_place_of_classes(pipe):
    embeds = pipe.prior.get_class_embeds(torch.tensor([1, 2]))
    assert torch.equal(pipe(class_embeds=embeds, top_k=1).codes, pipe([1, 2], top_k=1).codes)


def test_folders(pipe, tmp_path):
    pipe.save_pretrained(str(tmp_path))
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(loaded) is ARPipeline
    assert torch.equal(loaded(2, generator=seeded()).codes, pipe(2, generator=seeded()).codes)


def test_each_kind_has_its_pipeline(pipe):
    with pytest.raises(ValueError, match="one of raster order: pass it to `ARPipeline`"):
        VARPipeline(pipe.prior, pipe.vqvae)
    schedule = {"patch_nums": (1, 2, 4)}
    with pytest.raises(ValueError, match="a VARTransformer of whole scales: pass it to `VARPipeline`"):
        ARPipeline(make_vqvae(**schedule), make_transformer(**schedule))
    with pytest.raises(ValueError, match="must be 8 and 8: only an `RQTransformer` samples larger images"):
        pipe(0, height=16)
