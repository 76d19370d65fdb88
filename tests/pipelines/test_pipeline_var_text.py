# SPDX-License-Identifier: Apache-2.0
"""The text-to-image pipeline: texts and their embeddings, guidance, mixtures, and what users of diffusers expect."""

import inspect
import json

import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LogitsProcessor

from hf_var import VARPipelineOutput, VARTextInpaintPipeline, VARTextToImagePipeline
from hf_var.pipelines.options import TextCallOptions
from hf_var.training.lora import add_lora, save_lora
from pipelines.texts import (
    PROMPTS,
    embeddings_of,
    make_text_encoder,
    make_text_pipeline,
    make_text_transformer,
    make_tokenizer,
)
from pipelines.tiny import make_vqvae, seeded


LENGTH = 21


@pytest.fixture(params=[False, True], ids=["own_scale", "causal"])
def pipe(request):
    return make_text_pipeline(transformer={"is_causal": request.param})


def draw(pipe, prompt=None, seed=0, **settings):
    prompt = PROMPTS if prompt is None and "prompt_embeds" not in settings else prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, **{"generator": seeded(seed), "output_type": "pt", **settings})


def assert_equal(output, expected):
    assert torch.equal(output.codes, expected.codes)
    assert torch.equal(output.images, expected.images)


def batch_sizes(pipe, **settings):
    """Images in the batch of each call of the transformer."""
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    draw(pipe, **settings)
    handle.remove()
    return seen


# --- calls -----------------------------------------------------------------------------------------------------------


def test_every_option_is_shown_and_documented():
    parameters = inspect.signature(VARTextToImagePipeline.__call__).parameters
    assert list(parameters)[:2] == ["self", "prompt"]
    assert TextCallOptions.__optional_keys__ == parameters.keys() - {"self", "prompt"}
    documentation = inspect.getdoc(VARTextToImagePipeline.__call__)
    assert [name for name in parameters if name != "self" and f"{name} (" not in documentation] == []
    defaults = {"guidance_start": 0, "guidance_end": None, "smooth_start": 0, "num_images_per_prompt": 1}
    assert {name: parameters[name].default for name in defaults} == defaults


def test_a_prompt_is_a_picture(pipe):
    output = pipe(PROMPTS[0])
    assert isinstance(output, VARPipelineOutput)
    assert [type(image) for image in output.images] == [PIL.Image.Image]
    assert output.codes.shape == (1, LENGTH)
    images, codes = pipe(PROMPTS, return_dict=False)
    assert (len(images), codes.shape) == (3, (3, LENGTH))
    output = draw(pipe)
    assert output.images.shape == (3, 3, 8, 8)
    assert output.images.std(dim=(1, 2, 3)).min() > 0.1


def test_prompts_and_seeds_count(pipe):
    expected = draw(pipe)
    assert_equal(draw(pipe), expected)
    assert not torch.equal(draw(pipe, seed=1).codes, expected.codes)
    other = draw(pipe, [PROMPTS[1], PROMPTS[0], PROMPTS[2]])
    assert not torch.equal(other.codes[:2], expected.codes[:2])


def test_a_batch_equals_its_images(pipe):
    generators = [seeded(seed) for seed in range(3)]
    together = draw(pipe, generator=generators, negative_prompt=["the cat", "", "blurry"])
    for image, (prompt, negative) in enumerate(zip(PROMPTS, ["the cat", "", "blurry"], strict=True)):
        single = draw(pipe, prompt, seed=image, negative_prompt=negative)
        assert torch.equal(single.codes, together.codes[image : image + 1])
        torch.testing.assert_close(single.images, together.images[image : image + 1], atol=1e-5, rtol=0)


def test_several_images_of_each_prompt(pipe):
    generators = [seeded(seed) for seed in range(6)]
    settings = {"negative_prompt": ["the cat", "", "blurry"], "num_images_per_prompt": 2}
    several = draw(pipe, generator=generators, **settings)
    for image in range(6):
        single = draw(pipe, PROMPTS[image // 2], seed=image, negative_prompt=settings["negative_prompt"][image // 2])
        assert torch.equal(single.codes, several.codes[image : image + 1])


# --- texts and embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negative_prompt", [None, "blurry", ["blurry", "", "dark mat"]], ids=str)
def test_embeddings_in_place_of_prompts(pipe, negative_prompt):
    expected = draw(pipe, negative_prompt=negative_prompt)
    embeddings = embeddings_of(pipe, PROMPTS, negative_prompt=negative_prompt)
    assert [values.shape[0] for values in embeddings.values()] == [3] * 6
    assert embeddings["prompt_embeds"].shape == (3, 20, 40)
    assert embeddings["pooled_prompt_embeds"].shape == (3, 16)
    assert_equal(draw(pipe, **embeddings), expected)
    # Also without text encoders, and with truth values as masks.
    bare = make_text_pipeline(transformer={"is_causal": pipe.transformer.config.is_causal}, has_encoders=False)
    masks = {name: values.bool() for name, values in embeddings.items() if name.endswith("mask")}
    assert_equal(draw(bare, **{**embeddings, **masks}), expected)
    # What is given is returned.
    again = pipe.encode_prompt(**embeddings)
    assert all(map(torch.equal, again, embeddings.values()))


def test_embeddings_beside_texts(pipe):
    expected, embeddings = draw(pipe, negative_prompt="blurry"), embeddings_of(pipe, PROMPTS, negative_prompt="blurry")
    positive = {name: values for name, values in embeddings.items() if "negative" not in name}
    negative = {name: values[:1] for name, values in embeddings.items() if "negative" in name}
    assert_equal(draw(pipe, negative_prompt="blurry", **positive), expected)
    assert_equal(draw(pipe, PROMPTS, **negative), expected)


def test_encoded_prompts_are_repeated(pipe):
    found = pipe.encode_prompt(PROMPTS, num_images_per_prompt=2, negative_prompt="blurry")
    single = pipe.encode_prompt(PROMPTS, negative_prompt="blurry")
    for values, expected in zip(found, single, strict=True):
        assert torch.equal(values, expected.repeat_interleave(2, dim=0))
    unguided = pipe.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    assert unguided[1] is unguided[3] is unguided[5] is None
    torch.testing.assert_close(unguided[0], single[0][:1])


def test_long_prompts_are_cut_off_with_a_warning(pipe, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_var.text_encoders.logger.warning", warnings.append)
    text = "a red cat " * 8
    long = draw(pipe, text + "on the mat")
    assert len(warnings) == 2
    assert "of which the model reads the first 20" in warnings[0]
    assert_equal(draw(pipe, text + "two birds"), long)


def test_one_text_encoder_is_enough():
    transformer = make_text_transformer(cross_attention_dim=16, pooled_projection_dim=16)
    pipe = VARTextToImagePipeline(transformer, make_vqvae(), make_text_encoder(2), make_tokenizer(2))
    output = draw(pipe)
    assert pipe.encode_prompt(PROMPTS)[0].shape == (3, 20, 16)
    assert not torch.equal(output.codes[0], output.codes[1])


def test_the_size_of_a_picture(pipe):
    expected = draw(pipe)
    assert_equal(draw(pipe, original_size=(512, 512)), expected)
    # Of the same aspect: a square is no crop, whatever its size.
    assert_equal(draw(pipe, original_size=[(64, 64)] * 3), expected)
    other = draw(pipe, original_size=[(512, 512), (300, 900), (512, 512)])
    same = [torch.equal(other.codes[image], expected.codes[image]) for image in range(3)]
    # The random numbers of later images do not depend on earlier ones, but all share a scale's.
    assert not same[1]
    assert not torch.equal(draw(pipe, original_size=(300, 900)).codes, expected.codes)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_the_empty_negative_prompt_is_the_default(pipe):
    expected = draw(pipe)
    for negative_prompt in ("", [""], ["", "", ""]):
        assert_equal(draw(pipe, negative_prompt=negative_prompt), expected)
    assert not torch.equal(draw(pipe, negative_prompt="the cat").codes, expected.codes)


def test_without_guidance_nothing_negative_is_computed(pipe):
    encoded = []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output[0])))
    expected = draw(pipe, guidance_scale=1.0)
    assert encoded == [3]
    assert_equal(draw(pipe, guidance_scale=1.0, negative_prompt="the cat"), expected)
    assert_equal(draw(pipe, guidance_scale=5.0, guidance_end=0), expected)
    assert_equal(draw(pipe, guidance_scale=5.0, guidance_start=2, guidance_end=2), expected)
    assert encoded == [3] * 4
    assert batch_sizes(pipe, guidance_scale=1.0) == [3, 3, 3]


def test_guidance_of_some_scales(pipe):
    def in_window(k, num_scales):
        return 1 + 4 * k / (num_scales - 1) if 1 <= k < 2 else 1.0

    expected = draw(pipe, guidance_scale=in_window)
    assert_equal(draw(pipe, guidance_scale=5.0, guidance_start=1, guidance_end=2), expected)
    assert not torch.equal(draw(pipe, guidance_scale=5.0).codes, expected.codes)
    # The unconditional half is computed until guidance ends, also before it begins.
    assert batch_sizes(pipe, guidance_scale=5.0, guidance_start=1, guidance_end=2) == [6, 6, 3]
    assert batch_sizes(pipe, guidance_scale=5.0, guidance_end=1) == [6, 3, 3]
    assert batch_sizes(pipe, guidance_scale=5.0, guidance_start=2) == [6, 6, 6]
    assert_equal(
        draw(pipe, guidance_scale=lambda k, num_scales: 3.0, guidance_start=2),
        draw(pipe, guidance_scale=lambda k, num_scales: 3.0 if k == 2 else 1.0),
    )


def test_constant_guidance_is_a_rule_of_the_checkpoint(pipe, tmp_path):
    expected = draw(pipe, guidance_scale=lambda k, num_scales: 5.0)
    constant = VARTextToImagePipeline(**pipe.components, guidance_rule="constant")
    constant.set_progress_bar_config(disable=True)
    assert_equal(draw(constant, guidance_scale=5.0), expected)
    assert not torch.equal(draw(pipe, guidance_scale=5.0).codes, expected.codes)
    window = {"guidance_start": 1, "guidance_end": 2}
    in_window = draw(pipe, guidance_scale=lambda k, num_scales: 5.0, **window)
    assert_equal(draw(constant, guidance_scale=5.0, **window), in_window)
    constant.save_pretrained(tmp_path)
    loaded = VARTextToImagePipeline.from_pretrained(tmp_path)
    assert loaded.config.guidance_rule == "constant"
    assert VARTextInpaintPipeline.from_pipe(loaded).config.guidance_rule == "constant"
    with pytest.raises(ValueError, match="`guidance_rule` must be one of linear, constant, got 'cosine'"):
        VARTextToImagePipeline(**pipe.components, guidance_rule="cosine")


def test_a_negative_prompt_of_each_image(pipe):
    negatives = ["the cat", "", "blurry"]
    expected = draw(pipe, generator=[seeded(seed) for seed in range(3)], negative_prompt=negatives)
    shuffled = draw(pipe, generator=[seeded(seed) for seed in range(3)], negative_prompt=negatives[::-1])
    assert torch.equal(shuffled.codes[1], expected.codes[1])
    assert not torch.equal(shuffled.codes[0], expected.codes[0])


def test_temperatures_of_scales(pipe):
    expected = draw(pipe)
    cold = draw(pipe, temperature=[1.0, 1.0, 1e-4])
    assert torch.equal(cold.codes[:, :5], expected.codes[:, :5])
    assert not torch.equal(cold.codes[:, 5:], expected.codes[:, 5:])
    greedy = draw(pipe, top_k=[0, 0, 1], top_p=0.0)
    free = draw(pipe, top_k=0, top_p=0.0, temperature=[1.0, 1.0, 1e-4])
    assert torch.equal(greedy.codes, free.codes)


# --- mixtures --------------------------------------------------------------------------------------------------------


class NoDraws(LogitsProcessor):
    """Leaves one code alone."""

    def __call__(self, input_ids, scores):
        return torch.where(torch.arange(scores.shape[-1]) == 3, scores, -torch.inf)


def test_the_plain_rule_of_mixtures(pipe):
    assert pipe.config.smooth_rule == "plain"
    plain = draw(pipe, smooth=True)
    # Filters have no say.
    assert_equal(draw(pipe, smooth=True, top_k=1), plain)
    drawn = draw(pipe)
    assert not torch.equal(plain.images, drawn.images)
    assert not torch.equal(plain.images, pipe.vqvae.decode(plain.codes).sample / 2 + 0.5)
    # It ends with guidance, and begins where it is told to.
    assert_equal(draw(pipe, smooth=True, guidance_end=0), draw(pipe, guidance_end=0))
    some = draw(pipe, smooth=True, smooth_start=2)
    assert torch.equal(some.codes[:, :5], drawn.codes[:, :5])
    assert not torch.equal(some.images, drawn.images)
    assert_equal(draw(pipe, smooth=True, smooth_start=3), drawn)
    # With one code left, the mixture is its vector.
    single = draw(pipe, smooth=True, logits_processor=NoDraws())
    assert (single.codes == 3).all()
    torch.testing.assert_close(single.images, draw(pipe, logits_processor=NoDraws()).images)


def test_the_filtered_rule_is_that_of_class_pipelines(pipe):
    other = VARTextToImagePipeline(**pipe.components, smooth_rule="filtered")
    mixed, drawn = draw(other, smooth=True), draw(other)
    assert not torch.equal(mixed.images, draw(pipe, smooth=True).images)
    # Codes are drawn besides, and guidance does not end it.
    assert torch.equal(mixed.codes[:, :1], drawn.codes[:, :1])
    assert not torch.equal(draw(other, smooth=True, guidance_end=0).images, draw(other, guidance_end=0).images)
    # With one code to choose from, the mixture is its vector.
    torch.testing.assert_close(draw(other, smooth=True, top_k=1).images, draw(other, top_k=1).images)


# --- previews, candidates, other transformers -------------------------------------------------------------------------


def test_previews_and_interruption(pipe):
    seen = []

    def watch(pipe, step, k, tensors):
        seen.append((step, k, tensors["latents"].shape, tensors["images"].shape, tensors["images"].std().item()))
        pipe._interrupt = k == 1

    inputs = ["latents", "images"]
    output = draw(pipe, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=inputs)
    assert [entry[:4] for entry in seen] == [(k, k, (3, 4, 4, 4), (3, 3, 8, 8)) for k in range(2)]
    assert output.codes.shape == (3, 5)
    expected = draw(pipe)
    assert torch.equal(output.codes, expected.codes[:, :5])
    progress = pipe.decode_progress(expected.codes, output_type="pt")
    torch.testing.assert_close(progress[-1], expected.images)


def test_the_best_of_several_candidates(pipe):
    calls = []

    def score(images, numbers):
        calls.append(numbers.tolist())
        return images.mean(dim=(1, 2, 3))

    best = draw(pipe, num_candidates=3, score_fn=score, num_images_per_prompt=2)
    # The numbers of the prompts.
    assert calls == [[0, 0, 1, 1, 2, 2]] * 3
    first = draw(pipe, num_images_per_prompt=2)
    assert (best.images.mean(dim=(1, 2, 3)) >= first.images.mean(dim=(1, 2, 3))).all()


def test_a_refiner_samples_the_last_scales(pipe):
    config = {"is_causal": pipe.transformer.config.is_causal}
    refiner = make_text_transformer(seed=7, num_hidden_layers=1, **config)
    output, expected = draw(pipe, refiner=refiner, refiner_start=2), draw(pipe)
    assert torch.equal(output.codes[:, :5], expected.codes[:, :5])
    assert not torch.equal(output.codes[:, 5:], expected.codes[:, 5:])
    # The same transformer, which reads all scales anew, refines nothing.
    twin = make_text_transformer(**config)
    assert torch.equal(draw(pipe, refiner=twin, refiner_start=1).codes, expected.codes)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_pipeline_back(pipe, tmp_path):
    own = {"guidance_scale": 3.0, "top_k": 7, "top_p": 0.5, "temperature": 1.5, "smooth_rule": "filtered"}
    pipe = VARTextToImagePipeline(**pipe.components, **own)
    expected, mixed = draw(pipe), draw(pipe, smooth=True)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index.items() >= own.items()
    assert index["transformer"] == ["hf_var", "TextVARTransformer"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModel"]
    for loader in (VARTextToImagePipeline, DiffusionPipeline, AutoPipelineForText2Image):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is VARTextToImagePipeline
        assert_equal(draw(loaded), expected)
        assert_equal(draw(loaded, smooth=True), mixed)
    assert_equal(draw(VARTextToImagePipeline.from_pipe(pipe)), expected)
    half = VARTextToImagePipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.transformer.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.text_encoder.parameters()} == {torch.bfloat16}
    images = draw(half).images
    assert images.isfinite().all()
    assert images.std() > 0.1


def test_defaults_of_the_checkpoint(pipe):
    settings = {"guidance_scale": 3.0, "top_k": 2, "top_p": 0.5, "temperature": 2.5}
    assert {name: pipe.config[name] for name in settings} == {
        "guidance_scale": 7.0,
        "top_k": 400,
        "top_p": 0.95,
        "temperature": 1.0,
    }
    expected = draw(pipe, **settings)
    assert_equal(draw(VARTextToImagePipeline(**pipe.components, **settings)), expected)
    changes = [draw(pipe, **{name: value}).codes.tolist() for name, value in settings.items()]
    assert len({str(codes) for codes in [*changes, draw(pipe).codes.tolist()]}) == 5
    # More codes than there are mean all.
    assert_equal(draw(pipe, top_k=0), draw(pipe))


def test_a_folder_without_text_encoders(pipe, tmp_path):
    embeddings, expected = embeddings_of(pipe, PROMPTS), draw(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    # They need not be loaded, and a folder need not have them.
    bare = VARTextToImagePipeline.from_pretrained(tmp_path / "whole", **dict.fromkeys(names[:2]))
    assert bare.text_encoder is bare.text_encoder_2 is None
    assert_equal(draw(bare, **embeddings), expected)
    bare = VARTextToImagePipeline.from_pretrained(tmp_path / "whole", **dict.fromkeys(names))
    bare.save_pretrained(tmp_path / "bare")
    assert not any((tmp_path / "bare" / name).exists() for name in names)
    loaded = VARTextToImagePipeline.from_pretrained(tmp_path / "bare")
    assert_equal(draw(loaded, **embeddings), expected)
    with pytest.raises(ValueError, match="`prompt_embeds` must be passed to a pipeline without text encoders"):
        draw(loaded)


def test_model_offloading_includes_the_text_encoders(pipe):
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        assert hasattr(getattr(pipe, name), "_hf_hook"), name
    assert_equal(draw(pipe), expected)
    embeddings = embeddings_of(pipe, PROMPTS)
    assert_equal(draw(pipe, **embeddings), expected)
    offloaded = make_text_pipeline(transformer={"is_causal": pipe.transformer.config.is_causal})
    for name in ("text_encoder", "text_encoder_2", "transformer", "vqvae"):
        cpu_offload(getattr(offloaded, name), execution_device=torch.device("cpu"), offload_buffers=True)
    assert_equal(draw(offloaded), expected)
    assert_equal(draw(offloaded, **embeddings), expected)


# --- speed and adapters ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("is_causal", [False, True], ids=["own_scale", "causal"])
def test_compiled_models_draw_the_same(is_causal, freezing):
    pipe, twin = (make_text_pipeline(transformer={"is_causal": is_causal, "num_hidden_layers": 1}) for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    pipe.compile(freezing=freezing, backend=counter, fullgraph=True)
    graphs = []
    for settings in ({}, {"guidance_end": 1}, {"smooth": True}, {"prompt": PROMPTS[:2]}):
        output, expected = draw(pipe, **settings), draw(twin, **settings)
        assert torch.equal(output.codes, expected.codes)
        torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-5)
        graphs.append(counter.frame_count)
    # One graph of the layers, or one for each scale and batch size and those of the decoder.
    assert graphs == [1] * 4 if freezing else graphs[0] == 4


def test_adapters_are_trained_saved_and_loaded(pipe, tmp_path):
    config = {"is_causal": pipe.transformer.config.is_causal}
    expected, adapted = draw(pipe), make_text_pipeline(transformer=config)
    parameters = add_lora(adapted.transformer, rank=2)
    names = {name.split(".lora_")[0] for name, _ in adapted.transformer.named_parameters() if ".lora_" in name}
    assert {"layers.0.attention.q_proj", "layers.1.cross_attention.k_proj", "layers.0.mlp.gate_proj"} < names
    assert len(parameters) == 2 * len(names) == 2 * 2 * 11
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.add_(torch.randn(parameter.shape, generator=seeded(number)) * 0.2)
    tuned = draw(adapted)
    assert not torch.equal(tuned.codes, expected.codes)
    save_lora(adapted.transformer, tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert_equal(draw(pipe), tuned)
    with pytest.raises(ValueError, match="`transformer` has live adapters"):
        pipe.save_pretrained(tmp_path / "pipeline")
    pipe.fuse_lora()
    assert torch.equal(draw(pipe).codes, tuned.codes)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe).images, expected.images, atol=1e-4, rtol=0)


# --- no text ---------------------------------------------------------------------------------------------------------


def test_guidance_leads_away_from_learned_vectors():
    pipe = make_text_pipeline(transformer={"learned_empty_text": True})
    expected = draw(pipe, guidance_scale=4.0)
    embeddings = embeddings_of(pipe, PROMPTS)
    assert not embeddings["negative_prompt_attention_mask"].any()
    assert_equal(draw(pipe, guidance_scale=4.0, **embeddings), expected)
    # The empty text is a text like any other.
    assert not torch.equal(draw(pipe, guidance_scale=4.0, negative_prompt="").codes, expected.codes)
    assert_equal(draw(pipe, guidance_scale=1.0), draw(pipe, guidance_scale=1.0, negative_prompt=""))
    without = make_text_pipeline(transformer={"learned_empty_text": True}, has_encoders=False)
    text = {name: values for name, values in embeddings.items() if not name.startswith("negative")}
    assert_equal(draw(without, guidance_scale=4.0, **text), expected)


def test_images_of_no_text():
    pipe = make_text_pipeline(transformer={"learned_empty_text": True})
    embeddings = embeddings_of(pipe, PROMPTS)
    text = {name: values for name, values in embeddings.items() if not name.startswith("negative")}
    nothing = {name: torch.zeros_like(values) for name, values in text.items()}
    assert_equal(
        draw(pipe, guidance_scale=1.0, **nothing), draw(pipe, guidance_scale=lambda k, num_scales: 0.0, **text)
    )
