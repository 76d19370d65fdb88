# SPDX-License-Identifier: Apache-2.0
"""Position by position and depth by depth: the pipeline of RQ-Transformers and of VQGAN's GPT."""

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from hf_var import ARPipeline, stack_codes, unstack_codes
from hf_var.conversion import load_rq_transformer, load_taming_gpt
from hf_var.pipelines.condition_inputs import coordinate_codes
from hf_var.scoring import classify, log_likelihood
from parity import load_lineage_case
from pipelines.stacked import (
    image_pipeline,
    make_stacked,
    make_text_tokenizer,
    make_tokenizer,
    naive_codes,
    text_pipeline,
)
from pipelines.tiny import seeded
from priors.rq import rq_model


# --- what is sampled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "guided", "tokens", "shared_tokens", "gpt"])
def test_samples_are_those_of_the_whole_model(kind):
    pipe = make_stacked(kind)
    labels = torch.tensor([0, 3, 4])
    output = pipe(labels, generator=seeded(), top_k=6)
    expected = naive_codes(pipe, {"class_labels": labels}, seed=0, top_k=6)
    assert torch.equal(output.codes, unstack_codes(expected))
    assert len(output.codes.unique()) > 4


def test_guidance():
    pipe = make_stacked("guided")
    labels = torch.tensor([0, 3])
    codes = pipe(labels, guidance_scale=3.0, generator=seeded(), top_k=0).codes
    nothing = {"class_labels": torch.tensor([-1, -1])}
    expected = naive_codes(pipe, {"class_labels": labels}, seed=0, weight=3.0, nothing=nothing)
    assert torch.equal(codes, unstack_codes(expected))
    assert not torch.equal(codes, pipe(labels, generator=seeded(), top_k=0).codes)
    unconditional = pipe([None, -1], guidance_scale=3.0, generator=seeded(), top_k=0).codes
    assert torch.equal(unconditional, pipe([5, 5], generator=seeded(), top_k=0).codes)


def test_guidance_of_single_depths():
    pipe = make_stacked("guided")
    weights = []
    pipe(0, generator=seeded(), guidance_scale=lambda k, maps: weights.append((k, maps)) or 1.0 + k)
    assert set(weights) == {(0, 3), (1, 3), (2, 3)}
    always = pipe(0, generator=seeded(), guidance_scale=2.0).codes
    by_depth = pipe(0, generator=seeded(), guidance_scale=lambda k, maps: 2.0).codes
    assert torch.equal(always, by_depth)


@pytest.mark.parametrize("name", ["class", "prefix"])
def test_tokens_of_the_gpt(name):
    """Greedy, sampled and completed tokens of taming-transformers."""
    case = load_lineage_case("gpt", name)
    heads = case.manifest["gpt_args"][name]["n_head"]
    grid = case.manifest["grid"]
    labels = {"num_labels": case.manifest["n_classes"]} if name == "class" else {"num_labels": 0}
    prior = load_taming_gpt(case.weights, patch_nums=[grid], num_attention_heads=heads, **labels)
    pipe = ARPipeline(make_tokenizer([grid], prior.config.codebook_size), prior)
    pipe.set_progress_bar_config(disable=True)
    labels = case.inputs.get("class/labels") if name == "class" else None
    condition = {} if name == "class" else {"condition_codes": case.inputs["prefix/condition_codes"]}
    runs = {
        "class": {
            "greedy": {"top_k": 1},
            "sampled_k8_t0.9_seed1": {"top_k": 8, "temperature": 0.9, "generator": seeded(1)},
            "sampled_k20_p0.9_t1.1_seed2": {
                "top_k": 20,
                "top_p": 0.9,
                "temperature": 1.1,
                "generator": seeded(2),
            },
            "completion_k8_seed4": {
                "top_k": 8,
                "generator": seeded(4),
                "codes": case.inputs["class/codes"],
                "num_given_rows": grid[0] // 2,
            },
        },
        "prefix": {"greedy": {"top_k": 1}, "sampled_k12_seed5": {"top_k": 12, "generator": seeded(5)}},
    }
    for run, options in runs[name].items():
        found = pipe(labels, **condition, **options).codes
        assert torch.equal(found, case.expected[f"{name}/{run}/tokens"]), run


@pytest.mark.parametrize(
    ("name", "window", "runs"),
    [
        ("prefix", "window", {"sliding_greedy": {"top_k": 1}, "sliding_k10_t0.95_seed6": {"temperature": 0.95}}),
        ("window16", None, {"sliding_k10_seed7": {}}),
    ],
)
def test_tokens_of_larger_grids(name, window, runs):
    """Those of the sliding window of taming-transformers."""
    case = load_lineage_case("gpt", name)
    side = case.manifest[window] if window else 16
    heads = case.manifest["gpt_args"][name]["n_head"]
    prior = load_taming_gpt(case.weights, patch_nums=[side], num_attention_heads=heads, num_labels=0)
    pipe = ARPipeline(make_tokenizer([side], prior.config.codebook_size), prior)
    pipe.set_progress_bar_config(disable=True)
    condition = case.inputs[f"{name}/big_condition_codes"]
    size = {"height": 2 * condition.shape[1], "width": 2 * condition.shape[2]}
    for run, options in runs.items():
        seed = int(run.rpartition("seed")[2]) if "seed" in run else 0
        options = {"top_k": 10, **options, "generator": seeded(seed)}
        output = pipe(condition_codes=condition.flatten(1), **size, **options, output_type="pt")
        assert torch.equal(output.codes, case.expected[f"{name}/{run}/tokens"].flatten(1)), run
        assert output.images.shape[2:] == (size["height"], size["width"])


@pytest.mark.parametrize("name", ["class", "text", "tokens"])
def test_codes_of_the_rq_transformer(name):
    """Greedy, sampled and completed codes of the official RQ-Transformer."""
    case = load_lineage_case("rqtransformer", name)
    arguments = case.manifest["arch"][name]
    *grid, depth = arguments["block_size"]
    prior = load_rq_transformer(
        case.weights,
        patch_nums=[grid] * depth,
        num_attention_heads=arguments["body"]["block"]["n_head"],
        cumulative_depth_inputs=arguments["cumsum_depth_ctx"],
    )
    config = prior.config
    vqvae = make_tokenizer(config.patch_nums, config.codebook_size, config.latent_channels)
    if name != "tokens":
        table = load_lineage_case("rqtransformer", "codebook").weights["weight"]
        vqvae.codebook.set_vectors(table[: config.codebook_size])
    pipe = ARPipeline(vqvae, prior)
    pipe.set_progress_bar_config(disable=True)
    labels = case.inputs.get(f"{name}/labels")
    condition = {"condition_codes": case.inputs["text/condition"]} if name == "text" else {}
    if name == "tokens":
        labels = [None] * len(case.inputs["tokens/codes"])
    given = case.inputs[f"{name}/codes"].flatten(1, 2)[:, : grid[1] + 2]
    runs = {
        "greedy": {"top_k": 1},
        "sampled_nofilter_seed1": {"top_k": 0},
        "sampled_k10_p0.9_t0.9_seed2": {"top_k": 10, "top_p": 0.9, "temperature": 0.9},
        "sampled_k_per_depth_seed3": {"top_k": [12, 8, 6, 5][:depth], "top_p": [0.95, 0.9, 0.85, 0.8][:depth]},
        "completion_k10_seed4": {"top_k": 10, "codes": unstack_codes(given)},
    }
    found = 0
    for run, options in runs.items():
        if f"{name}/{run}/codes" not in case.expected:
            continue
        found += 1
        seed = int(run.rpartition("seed")[2]) if "seed" in run else 0
        codes = pipe(labels, **condition, **options, generator=seeded(seed)).codes
        expected = case.expected[f"{name}/{run}/codes"]
        assert torch.equal(stack_codes(codes, depth), expected.flatten(1, 2)), run
    assert found >= 2


def test_coordinates():
    case = load_lineage_case("gpt", "prefix")
    arguments = case.manifest["coord_args"]
    found = coordinate_codes(case.inputs["coord/map"], arguments["n_embed"], arguments["down_factor"])
    # The public code's index of coordinate 1 lies past its table.
    assert torch.equal(found, case.expected["coord/codes"].clamp(max=arguments["n_embed"] - 1))
    assert case.expected["coord/codes"].max() == arguments["n_embed"]


# --- conditions ------------------------------------------------------------------------------------------------------


def test_prompts():
    pipe = text_pipeline()
    output = pipe(prompt=["a three", "a thin three"], generator=seeded(), output_type="pt")
    ids = torch.tensor([[2, 4, 0, 0], [2, 3, 4, 0]])
    assert torch.equal(output.codes, pipe(condition_codes=ids, generator=seeded()).codes)
    expected = naive_codes(pipe, {"condition_ids": ids}, seed=0)
    assert torch.equal(output.codes, unstack_codes(expected))
    guided = pipe(prompt="a three", guidance_scale=2.0, generator=seeded()).codes
    nothing = {"condition_ids": torch.full((1, 4), -1)}
    expected = naive_codes(pipe, {"condition_ids": ids[:1]}, seed=0, weight=2.0, nothing=nothing)
    assert torch.equal(guided, unstack_codes(expected))


def test_a_prompt_that_is_too_long(caplog):
    pipe = text_pipeline()
    codes = pipe(prompt="a thin thin thin three", generator=seeded()).codes
    assert torch.equal(codes, pipe(prompt="a thin thin thin", generator=seeded()).codes)


def test_without_a_prompt():
    pipe = text_pipeline()
    codes = pipe(num_images_per_label=2, generator=seeded()).codes
    expected = naive_codes(pipe, {"condition_ids": torch.full((2, 4), -1)}, seed=0)
    assert torch.equal(codes, unstack_codes(expected))
    assert torch.equal(codes, pipe([None, None], generator=seeded()).codes)
    with pytest.raises(ValueError, match="`condition_codes` must be passed"):
        text_pipeline("bidirectional")()
    with pytest.raises(ValueError, match="`guidance_scale` must be 1"):
        text_pipeline("bidirectional")(prompt="a", guidance_scale=2.0)


def test_images_as_the_condition():
    pipe = image_pipeline()
    pictures = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    output = pipe(condition_image=pictures, num_images_per_label=2, generator=seeded(), output_type="pt")
    pixels = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[:, :, None, None].expand(2, 3, 4, 6)
    ids = pipe.condition_vqvae.encode(pixels).codes
    assert len(ids.unique(dim=0)) == 2
    assert torch.equal(pipe.encode_conditions(pictures), ids)
    with pytest.raises(ValueError, match="needs a pipeline with a `condition_vqvae`"):
        text_pipeline().encode_conditions(pictures)
    expected = naive_codes(pipe, {"condition_ids": ids.repeat_interleave(2, dim=0)}, seed=0)
    assert torch.equal(output.codes, unstack_codes(expected))


def test_larger_images_see_the_condition_in_the_same_window():
    pipe = image_pipeline()
    picture = torch.rand(1, 3, 6, 10, generator=seeded(3))
    output = pipe(condition_image=picture, height=6, width=10, generator=seeded(), output_type="pt", top_k=1)
    assert output.codes.shape == (1, 15)
    assert output.images.shape == (1, 1, 6, 10)
    ids = pipe.condition_vqvae.at_size(6, 10).encode(picture * 2 - 1).codes
    assert torch.equal(output.codes, pipe(condition_codes=ids, height=6, width=10, top_k=1).codes)
    # A class is the same everywhere.
    pipe = make_stacked("classes")
    assert pipe(2, height=6, width=6, generator=seeded()).codes.shape == (1, 27)
    own = pipe(2, generator=seeded()).codes
    assert torch.equal(own, pipe(2, height=4, width=6, generator=seeded()).codes)


# --- completion, callbacks, batches ----------------------------------------------------------------------------------


def test_completion_keeps_what_is_given():
    pipe = make_stacked("classes")
    whole = pipe([0, 1, 2], generator=seeded()).codes
    completed = pipe([0, 1, 2], codes=whole, num_given_rows=1, generator=seeded(5)).codes
    stacks, others = (stack_codes(codes, 3) for codes in (whole, completed))
    assert torch.equal(stacks[:, :3], others[:, :3])
    assert not torch.equal(stacks[:, 3:], others[:, 3:])
    assert torch.equal(pipe([0, 1, 2], codes=whole, num_given_rows=0, generator=seeded()).codes, whole)
    several = pipe(0, codes=whole[:1], num_given_rows=1, num_images_per_label=3, generator=seeded()).codes
    assert len(several.unique(dim=0)) > 1
    assert torch.equal(stack_codes(several, 3)[:, :3], stacks[:1, :3].expand(3, 3, 3))


def test_an_interrupted_call_goes_on():
    pipe, seen = make_stacked("classes"), []

    def stop(pipe, step, k, tensors):
        seen.append((step, k, tensors["codes"].shape, tensors["images"].shape))
        pipe._interrupt = True

    names = ["codes", "images"]
    partial = pipe(
        [0, 1], generator=seeded(), callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names, top_k=1
    )
    assert seen == [(0, 0, (2, 9), (2, 1, 4, 6))]
    assert partial.codes.shape == (2, 9)
    whole = pipe([0, 1], top_k=1).codes
    assert torch.equal(pipe([0, 1], codes=partial.codes, top_k=1).codes, whole)
    assert torch.equal(stack_codes(partial.codes, 3), stack_codes(whole, 3)[:, :3])


def test_previews_are_of_what_is_known():
    pipe, previews = make_stacked("classes"), []
    arguments = {"callback_on_step_end_tensor_inputs": ["codes", "images"], "output_type": "pt"}
    output = pipe(0, generator=seeded(), callback_on_step_end=lambda *call: previews.append(call[3]), **arguments)
    assert len(previews) == 2
    torch.testing.assert_close(previews[-1]["images"], output.images)
    vectors = pipe.vqvae.code_vectors(stack_codes(output.codes, 3)).sum(dim=2)
    vectors[:, 3:] = 0
    latents = vectors.transpose(1, 2).unflatten(2, (2, 3))
    expected = pipe.vqvae.decode(latents=latents).sample / 2 + 0.5
    torch.testing.assert_close(previews[0]["images"], expected)


def test_a_generator_for_each_image_makes_it_independent_of_its_batch():
    pipe = make_stacked("guided")
    arguments = {"guidance_scale": 2.0}
    together = pipe([0, 1, None], generator=[seeded(seed) for seed in range(3)], **arguments).codes
    alone = [pipe(label, generator=[seeded(i)], **arguments).codes for i, label in enumerate([0, 1, None])]
    assert torch.equal(together, torch.cat(alone))


def test_progress_of_the_depths():
    pipe = make_stacked("classes")
    codes = pipe([0, 1], generator=seeded()).codes
    progress = pipe.decode_progress(codes, output_type="pt")
    assert len(progress) == 3
    for depth, images in enumerate(progress, start=1):
        expected = pipe.vqvae.decode(codes, num_scales=depth).sample / 2 + 0.5
        torch.testing.assert_close(images, expected)


# --- likelihoods and folders -----------------------------------------------------------------------------------------


def test_likelihoods():
    pipe = make_stacked("guided")
    codes = pipe([0, 1], generator=seeded()).codes
    found = log_likelihood(pipe, codes=codes, class_labels=[0, 1])
    stacks = stack_codes(codes, 3)
    logits = pipe.prior(torch.tensor([0, 1]), code_vectors=pipe.vqvae.code_vectors(stacks)).logits
    expected = logits.log_softmax(-1).gather(3, stacks[..., None])[..., 0]
    torch.testing.assert_close(found.total, expected.sum(dim=(1, 2)))
    torch.testing.assert_close(found.per_scale, expected.sum(dim=1))
    assert classify(pipe, codes=codes).posterior.shape == (2, 5)
    # Without a text, as a call without one samples.
    texts, codes = text_pipeline(), codes[:1] % 8
    stacks = stack_codes(codes, texts.prior.config.depth)
    read = (
        {"code_vectors": texts.vqvae.code_vectors(stacks)}
        if texts.prior.config.code_inputs == "vectors"
        else {"codes": stacks}
    )
    logits = texts.prior(condition_ids=torch.full((1, 4), -1), **read).logits
    expected = logits.log_softmax(-1).gather(3, stacks[..., None]).sum()
    torch.testing.assert_close(log_likelihood(texts, codes=codes).total, expected[None])


def test_folders(tmp_path):
    for name, pipe, condition in (
        ("classes", make_stacked("classes"), {"class_labels": 3}),
        ("text", text_pipeline(top_p=0.9), {"prompt": "a three"}),
        ("image", image_pipeline(), {"condition_image": Image.new("RGB", (6, 4), "green")}),
    ):
        pipe.save_pretrained(str(tmp_path / name))
        loaded = DiffusionPipeline.from_pretrained(str(tmp_path / name))
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is ARPipeline
        assert torch.equal(loaded(**condition, generator=seeded()).codes, pipe(**condition, generator=seeded()).codes)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("classes", {"class_labels": 6}, "`class_labels` must be in"),
        ("classes", {}, "`class_labels` must be classes"),
        ("classes", {"prompt": "a"}, "`prompt` has the unknown name 'a'"),
        ("classes", {"class_labels": 0, "condition_codes": torch.zeros(1, 1).long()}, "`class_labels` must be None"),
        ("classes", {"class_labels": 0, "codes": torch.zeros(1, 18).long()}, "`num_given_rows` must say"),
        ("classes", {"class_labels": 0, "codes": torch.zeros(1, 5).long()}, "a multiple of 3, at most 18, got"),
        ("classes", {"class_labels": 0, "codes": torch.full((1, 3), 11)}, r"`codes` must be in \[0, 11\)"),
        ("classes", {"class_labels": 0, "codes": torch.zeros(1, 3)}, "`codes` must be integers"),
        ("classes", {"class_labels": 0, "num_given_rows": 1}, "`num_given_rows` = 1 needs `codes`"),
        ("classes", {"class_labels": 0, "codes": torch.zeros(1, 18).long(), "num_given_rows": 2}, "from 0 to 1"),
        ("classes", {"class_labels": 0, "codes": torch.zeros(1, 3).long(), "num_given_rows": 1}, "must hold 1 rows"),
        ("classes", {"class_labels": [0, 1, 2], "codes": torch.zeros(2, 3).long()}, "must be as many"),
        ("classes", {"class_labels": 0, "height": 2}, "`height` and `width` must be at least 4 and 6"),
        ("classes", {"class_labels": 0, "height": 7}, "multiple"),
        ("classes", {"class_labels": 0, "top_k": [1, 2]}, "must be one value or 3"),
        ("classes", {"class_labels": 0, "class_embeds": torch.zeros(1, 4)}, "`class_embeds` need a VARTransformer"),
        ("text", {"prompt": 3}, "`prompt` must be a text or a list of texts"),
        ("text", {"prompt": "a", "condition_codes": torch.zeros(1, 4).long()}, "Pass one of"),
        ("text", {"class_labels": 1}, "`class_labels` must be"),
        ("text", {"condition_codes": torch.zeros(1, 3).long()}, r"must be integers of the shape \(batch, 4\)"),
        ("text", {"condition_codes": torch.full((1, 4), 7)}, r"must be in \[0, 7\)"),
        ("text", {"condition_image": torch.zeros(1, 3, 4, 6)}, "needs a pipeline with a `condition_vqvae`"),
    ],
)
def test_wrong_arguments(kind, arguments, message):
    pipe = text_pipeline() if kind == "text" else make_stacked(kind)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_models_that_do_not_belong_together():
    classes, prefix = rq_model("classes"), rq_model("prefix_gpt")
    three, one = make_tokenizer([(2, 3)] * 3), make_tokenizer([(2, 3)])
    for arguments, message in (
        ((one, classes), "patch_nums is"),
        ((make_tokenizer([(2, 3)] * 3, 12), classes), "codebook_size is 11 in the prior and 12"),
        ((make_tokenizer([(2, 3)] * 3, latent_channels=5), classes), "latent_channels is 4"),
        ((three, classes, None, classes), "`bottom_prior` must be None"),
        ((three, classes, None, None, one), "`condition_vqvae` must be None"),
        ((one, prefix, None, None, make_tokenizer([(2, 2)])), "must make 6 codes below 11 for `prior`, got 4 of 11"),
        ((one, prefix, None, None, classes), "`condition_vqvae` must be a tokenizer"),
        ((one, prefix, None, None, None, "text"), "one of transformers' tokenizers"),
        ((classes, classes), "`vqvae` must be a `VQVAEModel`"),
    ):
        with pytest.raises(ValueError, match=message):
            ARPipeline(*arguments)
    tokenizer = make_text_tokenizer()
    tokenizer.add_tokens(["four", "five", "six"])
    with pytest.raises(ValueError, match="`tokenizer` must have at most the 7 tokens"):
        make_stacked("text", {"tokenizer": tokenizer})
