# SPDX-License-Identifier: Apache-2.0
"""Texts, sampling and images of the text-to-image pipeline against the numbers of the official code of Switti."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LogitsProcessor

from hf_var import VARTextToImagePipeline
from hf_var.conversion import load_official_vqvae
from parity import load_switti_case
from pipelines.tiny import seeded


pytestmark = pytest.mark.parity
RUNS = list(load_switti_case().manifest["gen_runs"])


@pytest.fixture(scope="module")
def case():
    return load_switti_case()


@pytest.fixture(scope="module")
def text_parts(case):
    """Text encoders and tokenizers."""
    parts = {}
    for number, arguments in enumerate(case.manifest["text_encoders"], start=1):
        encoder = CLIPTextModel(CLIPTextConfig(**arguments))
        encoder.load_state_dict(case.weights[f"text_encoder_{number}"])
        suffix = "" if number == 1 else "_2"
        parts[f"text_encoder{suffix}"] = encoder.eval()
        parts[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(case.folder / f"tokenizer_{number}")
    return parts


@pytest.fixture(scope="module")
def pipelines(case, text_parts):
    vqvae = load_official_vqvae(case.weights["vae"], patch_nums=case.manifest["vae_args"]["v_patch_nums"])
    made = {
        variant: VARTextToImagePipeline(case.transformer(variant), vqvae, **text_parts) for variant in case.variants
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe(pipelines):
    return pipelines["ar0_crop1"]


class Watch(LogitsProcessor):
    """Keeps the guided logits of every scale, over the temperature."""

    def __init__(self, temperature):
        self.temperature, self.seen = temperature, []

    def __call__(self, input_ids, scores, scale, previous_logits):
        self.seen.append(scores / self.temperature[scale])
        return scores


def generate(case, pipe, run, **options):
    """A run of the official code, whose `cfg` is our guidance scale less one."""
    num_scales, end = len(pipe.vqvae.config.patch_nums), run["turn_off_cfg_start_si"]
    # Every scale from that one on, not the last alone.
    last = 1.0 if run["last_scale_temp"] is None else run["last_scale_temp"]
    temperature = [last if k >= end else 1.0 for k in range(num_scales)]
    settings = {
        "negative_prompt": run["null_prompt"],
        "guidance_scale": run["cfg"] + 1,
        "guidance_start": run["turn_on_cfg_start_si"],
        "guidance_end": min(end, num_scales),
        "top_k": run["top_k"],
        "top_p": run["top_p"],
        "temperature": temperature,
        "smooth": run["more_smooth"],
        "smooth_start": run["smooth_start_si"],
    }
    watch = Watch(temperature)
    output = pipe(
        case.manifest["prompts"], generator=seeded(run["seed"]), logits_processor=watch, **{**settings, **options}
    )
    return output, torch.cat([seen.unflatten(0, (2, -1)) for seen in watch.seen], dim=1)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_token_ids_are_the_official_ones(case, text_parts):
    texts = [*case.manifest["texts"], case.manifest["negative_prompt"]]
    for number, suffix in ((1, ""), (2, "_2")):
        tokens = text_parts[f"tokenizer{suffix}"](
            texts, padding="max_length", max_length=case.manifest["max_length"], truncation=True, return_tensors="pt"
        )
        assert torch.equal(tokens.input_ids, case.inputs[f"input_ids_{number}"])
        assert torch.equal(tokens.attention_mask, case.inputs[f"attention_mask_{number}"])


def test_each_text_encoder(case, text_parts):
    number_of_texts = len(case.manifest["texts"])
    for number, suffix in ((1, ""), (2, "_2")):
        ids, mask = (case.inputs[f"{name}_{number}"][:number_of_texts] for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            output = text_parts[f"text_encoder{suffix}"](input_ids=ids, attention_mask=mask)
        case.assert_close(f"text/last_hidden_state_{number}", output.last_hidden_state)
        case.assert_close(f"text/pooler_output_{number}", output.pooler_output)


def test_encoded_prompts(case, pipe):
    embeds, _, pooled, _, mask, _ = pipe.encode_prompt(case.manifest["texts"], do_classifier_free_guidance=False)
    case.assert_close("text/prompt_embeds", embeds)
    case.assert_close("text/pooled_prompt_embeds", pooled)
    assert torch.equal(mask == 1, case.expected["text/attn_bias"] == 0)


def test_encoded_negative_prompts(case, pipe):
    negative = case.manifest["negative_prompt"]
    embeds, negative_embeds, pooled, negative_pooled, mask, negative_mask = pipe.encode_prompt(
        case.manifest["prompts"], negative_prompt=negative
    )
    case.assert_close("text/cfg_prompt_embeds", torch.cat([embeds, negative_embeds]))
    case.assert_close("text/cfg_pooled_prompt_embeds", torch.cat([pooled, negative_pooled]))
    assert torch.equal(torch.cat([mask, negative_mask]) == 1, case.expected["text/cfg_attn_bias"] == 0)


# --- the tokenizer of images -----------------------------------------------------------------------------------------


def test_the_tokenizer(case, pipe):
    with torch.no_grad():
        encoded = pipe.vqvae.encode(case.inputs["images"])
        case.assert_close("tok/features", encoded.features)
        case.assert_close("tok/codes", encoded.codes)
        case.assert_close("tok/teacher_input", pipe.vqvae.teacher_forcing(encoded.codes))
        case.assert_close("tok/recon", pipe.vqvae.decode(encoded.codes).sample)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_generation(case, pipelines, name):
    run, latents = case.manifest["gen_runs"][name], []

    def keep(pipe, step, k, tensors):
        latents.append(tensors["latents"].clone())

    output, logits = generate(case, pipelines[run["variant"]], run, output_type="pt", callback_on_step_end=keep)
    expected, is_mixed = case.expected[f"gen/{name}/tokens"], case.expected[f"gen/{name}/tokens"] < 0
    assert bool(is_mixed.any()) == run["more_smooth"]
    if run["more_smooth"]:
        # There are no codes where vectors are mixed; ours are those of the largest weights.
        expected = torch.where(is_mixed, case.expected[f"gen/{name}/soft_argmax"], expected)
    assert torch.equal(output.codes, expected)
    case.assert_close(f"gen/{name}/logits", logits)
    case.assert_close(f"gen/{name}/f_hat", torch.stack(latents))
    case.assert_close(f"gen/{name}/image", output.images)


@pytest.mark.parametrize(
    "name", [run for run in RUNS if f"gen/{run}/logits_conditional" in load_switti_case().expected]
)
def test_both_halves_of_the_batch(case, pipelines, name):
    run, halves = case.manifest["gen_runs"][name], []
    pipe = pipelines[run["variant"]]
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: halves.append(output.logits))
    try:
        generate(case, pipe, run, output_type="latent")
    finally:
        handle.remove()
    end = run["turn_off_cfg_start_si"]
    # The unconditional half ends where guidance does.
    assert [len(logits) for logits in halves] == [4 if k < end else 2 for k in range(len(halves))]
    case.assert_close(f"gen/{name}/logits_conditional", torch.cat([logits[:2] for logits in halves], dim=1))
    unconditional = [logits[2:] for logits in halves[:end]]
    case.assert_close(f"gen/{name}/logits_unconditional", torch.cat(unconditional, dim=1))
