# SPDX-License-Identifier: Apache-2.0
"""Text-to-image models on the command line: conversion of a whole pipeline, and images of prompts."""

import numpy
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from hf_var import TextVARTransformer, VARTextToImagePipeline
from hf_var.cli import main
from hf_var.conversion import export_official_vqvae, export_switti
from hf_var.pipelines.image_grids import image_grid
from parity import assert_same_tensors, load_switti_case
from pipelines.texts import make_text_pipeline, make_tokenizer
from pipelines.tiny import seeded


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a model, and the folders of its text encoders."""
    folder, case = tmp_path_factory.mktemp("switti"), load_switti_case()
    torch.save(case.weights["switti"], folder / "model.pt")
    torch.save(case.weights["vae"], folder / "vae.pt")
    (folder / "config.json").write_text('{"depth": 3, "use_ar": true}', encoding="utf-8")
    for number, arguments in enumerate(case.manifest["text_encoders"], start=1):
        config = CLIPTextConfig(**arguments)
        model = CLIPTextModel(config)
        if number == 1:
            # As CLIP is released, with an encoder of images beside that of texts.
            sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=8)
            whole = CLIPModel(
                CLIPConfig(text_config=config.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
            )
            model, kept = (
                whole,
                {name: tensor for name, tensor in whole.state_dict().items() if "text_model" not in name},
            )
            weights = case.weights["text_encoder_1"]
            prefix = "" if next(iter(weights)).startswith("text_model.") else "text_model."
            model.load_state_dict({**kept, **{prefix + name: tensor for name, tensor in weights.items()}})
        else:
            model.load_state_dict(case.weights[f"text_encoder_{number}"])
        model.save_pretrained(folder / f"encoder_{number}")
        make_tokenizer(number).save_pretrained(folder / f"encoder_{number}")
    return folder


def convert(files, output, *arguments):
    given = ["--switti", str(files / "model.pt"), "--num-attention-heads", "2", "--output", str(output)]
    return main(["convert", *given, *arguments])


def encoders(files):
    return ["--text-encoder", str(files / "encoder_1"), "--text-encoder-2", str(files / "encoder_2")]


def test_a_whole_pipeline(files, tmp_path):
    case = load_switti_case()
    assert convert(files, tmp_path / "out", "--vqvae", str(files / "vae.pt"), *encoders(files)) == 0
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    exported = export_switti(pipe.transformer)
    assert_same_tensors({name: exported[name] for name in case.weights["switti"]}, case.weights["switti"])
    assert_same_tensors(export_official_vqvae(pipe.vqvae), case.weights["vae"])
    # Its config.json says that scales see earlier ones.
    assert pipe.transformer.config.is_causal
    assert pipe.vqvae.config.patch_nums == pipe.transformer.config.patch_nums
    embeds, _, pooled, *_ = pipe.encode_prompt(case.manifest["texts"], do_classifier_free_guidance=False)
    case.assert_close("text/prompt_embeds", embeds)
    case.assert_close("text/pooled_prompt_embeds", pooled)
    output = pipe(case.manifest["prompts"], guidance_scale=4.0, top_k=1, top_p=0.0, output_type="pt")
    case.assert_close("gen/greedy_ar/tokens", output.codes)
    case.assert_close("gen/greedy_ar/image", output.images)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "VARTextToImagePipeline.from_pretrained" in card
    # The tokenizer comes with the transformer, not from VAR.
    assert "FoundationVision" not in card
    assert not ModelCard.load(tmp_path / "out" / "README.md").data.license


def test_a_pipeline_without_text_encoders(files, tmp_path):
    assert convert(files, tmp_path / "out", "--vqvae", str(files / "vae.pt"), "--no-causal") == 0
    pipe = VARTextToImagePipeline.from_pretrained(tmp_path / "out")
    assert pipe.text_encoder is pipe.tokenizer is pipe.text_encoder_2 is None
    assert not pipe.transformer.config.is_causal


def test_text_encoders_need_a_pipeline(files, tmp_path, capsys):
    assert convert(files, tmp_path / "out", *encoders(files)) == 2
    assert "--text-encoder and --text-encoder-2 go with --switti and --vqvae" in capsys.readouterr().err
    swapped = ["--text-encoder", str(files / "encoder_2"), "--text-encoder-2", str(files / "encoder_1")]
    assert convert(files, tmp_path / "out", "--vqvae", str(files / "vae.pt"), *swapped) == 2
    assert "`text_encoder` and `text_encoder_2` must have hidden states of 80" in capsys.readouterr().err
    lacking = CLIPTextModel(CLIPTextConfig(**load_switti_case().manifest["text_encoders"][0]))
    weights = {name: tensor for name, tensor in lacking.state_dict().items() if "final_layer_norm" not in name}
    lacking.save_pretrained(tmp_path / "lacking", state_dict=weights)
    for source, message in ((tmp_path / "lacking", "lacks weights of a CLIPTextModel"), (tmp_path / "none", "none")):
        arguments = ["--vqvae", str(files / "vae.pt"), "--text-encoder", str(source)]
        assert convert(files, tmp_path / "out", *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert convert(files, tmp_path / "out") == 0
    assert type(TextVARTransformer.from_pretrained(tmp_path / "out")) is TextVARTransformer


def test_images_of_prompts(tmp_path, capsys):
    pipe = make_text_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    prompts = ["a red cat", "two birds"]
    arguments = [
        "generate",
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out.png"),
    ]
    own = ["--num-images-per-label", "2", "--seed", "7", "--guidance-scale", "3", "--smooth"]
    assert main([*arguments, "--prompt", *prompts, "--negative-prompt", "mat", *own]) == 0
    settings = {"negative_prompt": "mat", "guidance_scale": 3.0, "smooth": True, "num_images_per_prompt": 2}
    images = pipe(prompts, generator=seeded(7), **settings).images
    expected = numpy.asarray(image_grid(images, 4))
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "out.png")), expected)
    assert main([*arguments, "--prompt", *prompts, "--class-labels", "3"]) == 2
    assert "--class-labels is not an option of a VARTextToImagePipeline" in capsys.readouterr().err
    assert main([*arguments]) == 2
    assert "`prompt` must be a text or a list of texts" in capsys.readouterr().err
    assert main(["generate", "--negative-prompt", "mat", "--output", str(tmp_path / "out.png")]) == 2
    assert "--negative-prompt is not an option of a VARPipeline" in capsys.readouterr().err
