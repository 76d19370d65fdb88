# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`, run as a user runs it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel

from hf_var import DIGITS_CHECKPOINT, ARPipeline, VARPipeline, VQVAEModel
from hf_var.cli import main
from hf_var.conversion import (
    export_official_var,
    export_official_vqvae,
    export_pixelcnn,
    export_pixelsnail,
    export_rq_transformer,
    export_rqvae,
    export_switti,
    export_taming_gpt,
    export_taming_vqgan,
    load_official_var,
    load_official_vqvae,
)
from hf_var.data import codes_fingerprint, load_source, tokenizer_fingerprint
from parity import assert_same_tensors, load_case, load_lineage_case, load_switti_case
from pipelines.stacked import make_tokenizer
from priors.rq import rq_model


@pytest.fixture(scope="module")
def official_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    case = load_case("A")
    torch.save(case.vqvae_weights, folder / "vae.pth")
    torch.save(case.var_weights, folder / "var.pth")
    return folder


@pytest.fixture(scope="module")
def converted(official_files):
    output = official_files / "converted"
    files = ["--vqvae", str(official_files / "vae.pth"), "--var", str(official_files / "var.pth")]
    assert main(["convert", *files, "--output", str(output)]) == 0
    return output


def test_convert_writes_a_pipeline_equal_to_the_files(converted):
    case = load_case("A")
    pipe = VARPipeline.from_pretrained(converted)
    for exported, official in (
        (export_official_var(pipe.transformer), case.var_weights),
        (export_official_vqvae(pipe.vqvae), case.vqvae_weights),
    ):
        assert exported.keys() == official.keys()
        assert all(torch.equal(exported[name], official[name]) for name in official)


def test_convert_one_file_writes_a_model(official_files, tmp_path):
    arguments = ["--vqvae", str(official_files / "vae.pth"), "--patch-nums", "1", "2", "3", "4"]
    assert main(["convert", *arguments, "--output", str(tmp_path / "vqvae")]) == 0
    model = VQVAEModel.from_pretrained(tmp_path / "vqvae")
    assert model.config.patch_nums == [1, 2, 3, 4]


def test_convert_takes_label_names(official_files, tmp_path):
    names = [f"animal {index}" for index in range(10)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    files = ["--vqvae", str(official_files / "vae.pth"), "--var", str(official_files / "var.pth")]
    assert (
        main(["convert", *files, "--id2label", str(tmp_path / "names.json"), "--output", str(tmp_path / "out")]) == 0
    )
    pipe = VARPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids("animal 7") == [7]


def test_convert_writes_a_pixel_prior(tmp_path):
    for name, export in (("pixelcnn", export_pixelcnn), ("pixelsnail", export_pixelsnail)):
        case = load_lineage_case(name if name == "pixelcnn" else "pixelsnail_bottom")
        torch.save(case.weights, tmp_path / f"{name}.pt")
        arguments = [f"--{name}", str(tmp_path / f"{name}.pt"), "--output", str(tmp_path / name)]
        assert main(["convert", *arguments, *(["--map-size", "6", "6"] if name == "pixelcnn" else [])]) == 0
        model = AutoModel.from_pretrained(tmp_path / name)
        assert model.config.length == (36 if name == "pixelcnn" else 64)
        assert_same_tensors(export(model), case.weights)


@pytest.mark.parametrize(
    ("flag", "model", "export", "patch_nums"),
    [
        ("--taming-gpt", ("gpt", "class"), export_taming_gpt, ["4"]),
        ("--rq-transformer", ("rqtransformer", "class"), export_rq_transformer, ["4", "4", "4"]),
    ],
)
def test_convert_writes_a_transformer_of_codes(tmp_path, flag, model, export, patch_nums):
    weights = load_lineage_case(*model).weights
    torch.save(weights, tmp_path / "last.ckpt")
    arguments = [flag, str(tmp_path / "last.ckpt"), "--num-attention-heads", "2", "--output", str(tmp_path / "out")]
    assert main(["convert", *arguments, "--patch-nums", *patch_nums]) == 0
    converted = AutoModel.from_pretrained(tmp_path / "out")
    assert converted.config.num_attention_heads == 2
    assert_same_tensors(export(converted), weights)


def test_convert_writes_a_transformer_that_reads_texts(tmp_path, capsys):
    weights = load_switti_case().weights["switti"]
    torch.save(weights, tmp_path / "last.pt")
    arguments = ["convert", "--switti", str(tmp_path / "last.pt"), "--num-attention-heads", "2", "--output"]
    assert main([*arguments, str(tmp_path / "no")]) == 2
    assert "`is_causal` cannot be inferred" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*arguments, str(tmp_path / "out"), "--causal"]) == 0
    (tmp_path / "config.json").write_text(json.dumps({"depth": 3, "rope_size": 96, "use_ar": True}))
    assert main([*arguments, str(tmp_path / "other"), "--no-causal"]) == 0
    for name, is_causal, rope_size in (("out", True, 128), ("other", False, 96)):
        converted = AutoModel.from_pretrained(tmp_path / name)
        assert (converted.config.is_causal, converted.config.rope_size) == (is_causal, rope_size)
        exported = export_switti(converted)
        assert_same_tensors({key: exported[key] for key in weights}, weights)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "apache-2.0" in card
    assert not ModelCard.load(tmp_path / "out" / "README.md").data.license


# What taming's networks cannot choose.
TAMING_SIZES = {"quant_conv_kernel_size": 1, "norm_num_groups": 32, "base_channels": 32}


def net2net_file(path, side=2):
    """The Lightning file of a GPT with tokenizers of images and of maps of classes; returns what is in it."""
    gpt = rq_model("prefix_gpt", patch_nums=[side], condition_length=side**2)
    sizes = {"patch_nums": [side], **TAMING_SIZES}
    vqvae = make_tokenizer(**sizes, in_channels=3)
    condition_vqvae = make_tokenizer(**sizes, in_channels=5, sample_type="class_map")
    parts = {
        "transformer": export_taming_gpt(gpt),
        "first_stage_model": export_taming_vqgan(vqvae),
        "cond_stage_model": export_taming_vqgan(condition_vqvae),
    }
    weights = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    torch.save({"state_dict": weights, "epoch": 3}, path)
    return parts


def test_convert_writes_the_pipeline_that_one_file_holds(tmp_path):
    parts = net2net_file(tmp_path / "last.ckpt")
    arguments = ["--taming-gpt", str(tmp_path / "last.ckpt"), "--num-attention-heads", "2", "--patch-nums", "2"]
    assert main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 0
    pipe = ARPipeline.from_pretrained(tmp_path / "out")
    assert_same_tensors(export_taming_gpt(pipe.prior), parts["transformer"])
    assert_same_tensors(export_taming_vqgan(pipe.vqvae), parts["first_stage_model"])
    assert_same_tensors(export_taming_vqgan(pipe.condition_vqvae), parts["cond_stage_model"])
    assert pipe.condition_vqvae.config.sample_type == "class_map"
    ids = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(0))
    assert pipe(condition_codes=ids, output_type="pt").images.shape == (2, 3, 4, 4)
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card
    assert "ARPipeline.from_pretrained" in card


def test_convert_writes_the_pipeline_of_two_files(tmp_path):
    vqvae = make_tokenizer([2, 2, 2], **TAMING_SIZES)
    prior = rq_model("classes", patch_nums=[2, 2, 2], hidden_size=64, num_attention_heads=1)
    files = {"rqvae": export_rqvae(vqvae), "rq_transformer": export_rq_transformer(prior)}
    arguments = []
    for name, weights in files.items():
        torch.save({"state_dict": weights}, tmp_path / f"{name}.pt")
        arguments += [f"--{name.replace('_', '-')}", str(tmp_path / f"{name}.pt")]
    assert main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 0
    pipe = ARPipeline.from_pretrained(tmp_path / "out")
    assert_same_tensors(export_rq_transformer(pipe.prior), files["rq_transformer"])
    assert_same_tensors(export_rqvae(pipe.vqvae), files["rqvae"])
    assert pipe([0, 3], output_type="pt").images.shape == (2, 1, 4, 4)
    card = (tmp_path / "out/README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card
    assert "| code of rq-vae-transformer | apache-2.0 |" in card
    assert main(["convert", *arguments, "--license", "mit", "--output", str(tmp_path / "own")]) == 0
    assert "license: mit" in (tmp_path / "own/README.md").read_text()


def test_convert_with_a_field_that_the_model_lacks(tmp_path, capsys):
    torch.save(load_lineage_case("pixelcnn").weights, tmp_path / "prior.pt")
    arguments = ["--pixelcnn", str(tmp_path / "prior.pt"), "--patch-nums", "6", "--output", str(tmp_path / "out")]
    assert main(["convert", *arguments]) == 2
    assert "`patch_nums` is not a field of PixelCNNConfig" in capsys.readouterr().err


def test_convert_two_kinds_of_priors(tmp_path, capsys):
    assert main(["convert", "--pixelcnn", "a.pt", "--var", "b.pth", "--output", str(tmp_path)]) == 2
    message = "--rq-transformer, --switti, or a transformer with its tokenizer"
    assert message in capsys.readouterr().err


def test_convert_without_a_file(tmp_path, capsys):
    assert main(["convert", "--output", str(tmp_path)]) == 2
    assert "--vqvae" in capsys.readouterr().err


def test_convert_swapped_files(official_files, tmp_path, capsys):
    files = ["--vqvae", str(official_files / "var.pth"), "--var", str(official_files / "vae.pth")]
    assert main(["convert", *files, "--output", str(tmp_path / "out")]) == 2
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generate_writes_what_the_pipeline_draws(converted, tmp_path):
    output = tmp_path / "new folder" / "out.png"
    assert main(["generate", "--model", str(converted), "--class-labels", "3", "none", "--output", str(output)]) == 0
    pipe = VARPipeline.from_pretrained(converted)
    expected = pipe([3, None], generator=torch.Generator().manual_seed(0)).images
    picture = Image.open(output)
    assert picture.size == (128, 64)
    assert picture.crop((0, 0, 64, 64)).tobytes() == expected[0].tobytes()
    assert picture.crop((64, 0, 128, 64)).tobytes() == expected[1].tobytes()


def test_generate_grid_and_seed(converted, tmp_path):
    common = ["generate", "--model", str(converted), "--class-labels", "1", "LABEL_2", "3", "--columns", "2"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = [*common, "--resize", "32", "--seed", seed, "--output", str(tmp_path / f"{name}.png")]
        assert main(arguments) == 0
    pictures = {name: Image.open(tmp_path / f"{name}.png") for name in "abc"}
    assert pictures["a"].size == (64, 64)
    assert pictures["a"].tobytes() == pictures["b"].tobytes()
    assert pictures["a"].tobytes() != pictures["c"].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-labels", "99"], "99"),
        (["--class-labels", "LABEL_77"], "LABEL_7"),
        (["--top-p", "1.5"], "top_p"),
        (["--output", "out.xyz"], "out.xyz"),
        (["--columns", "0"], "--columns"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_generate_bad_input(converted, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", str(converted), "--output", "out.png", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Twelve noisy pictures of the size of the embedded tokenizer's, with labels."""
    path = tmp_path_factory.mktemp("digits") / "digits.parquet"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    rows = {"image": [Image.fromarray(image) for image in pixels], "label": [index % 2 for index in range(12)]}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["even", "odd"])})
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def test_tokenize_writes_the_codes_of_the_tokenizer(digits, tmp_path, capsys):
    tokenizer = ["--vqvae", f"{DIGITS_CHECKPOINT}/vqvae"]
    output = tmp_path / "codes"
    arguments = ["--data", str(digits), *tokenizer, "--output", str(output), "--resize-ratio", "1"]
    assert main(["tokenize", *arguments, "--horizontal-flip", "--rows-per-shard", "6", "--batch-size", "4"]) == 0
    assert "24 rows of codes from 12 images" in capsys.readouterr().out
    assert len(list(output.glob("*.parquet"))) == 2
    rows = load_source("train_data", str(output), None, ["train"])
    assert rows.features["label"].names == ["even", "odd"]
    assert rows["label"][:] == [0, 0, 1, 1] * 6
    vqvae = VQVAEModel.from_pretrained(DIGITS_CHECKPOINT, subfolder="vqvae").eval()
    assert codes_fingerprint(str(output)) == tokenizer_fingerprint(vqvae)
    pixels = np.stack([np.asarray(image) for image in Dataset.from_parquet(str(digits))["image"]])
    pixel_values = torch.from_numpy(pixels).div(127.5).sub(1).unsqueeze(1)
    sides = torch.stack([pixel_values, pixel_values.flip(-1)], dim=1).flatten(0, 1)
    with torch.no_grad():
        expected = torch.cat([vqvae.encode(batch).codes for batch in sides.split(4)])
    assert rows["codes"][:] == expected.tolist()

    assert main(["tokenize", *arguments]) == 2
    assert "`horizontal_flip` was True" in capsys.readouterr().err


def test_without_the_extra_the_rest_works(digits, tmp_path):
    program = "import sys; sys.modules['datasets'] = None; from hf_var.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--data", str(digits), "--vqvae", "none", "--output", str(tmp_path / "codes")]
    for command, status, message in (
        (["--version"], 0, ""),
        (["tokenize", *arguments], 2, "datasets.*hf_var\\[train,eval\\]"),
    ):
        process = subprocess.run(
            [sys.executable, "-c", program, *command], capture_output=True, text=True, check=False
        )
        assert process.returncode == status, process.stderr
        assert re.search(message, process.stderr)
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("condition", "side"),
    [(["--class-labels", "3", "1", "4"], 16), (["--prompt", "a red heart", "ghost", "pizza"], 32)],
)
def test_the_embedded_checkpoints_are_the_default(condition, side, tmp_path):
    output = tmp_path / "picture.png"
    command = [sys.executable, "-m", "hf_var.cli", "generate", *condition, "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    assert Image.open(output).size == (3 * side, side)


def test_help_reads_well(capsys):
    for command in ("generate", "convert", "tokenize", "evaluate"):
        with pytest.raises(SystemExit) as exit_status:
            main([command, "--help"])
        assert exit_status.value.code == 0
        assert "example: hf-var" in capsys.readouterr().out


def test_official_loaders_accept_paths(official_files):
    assert load_official_var(official_files / "var.pth").config.num_hidden_layers == 2
    assert load_official_vqvae(str(official_files / "vae.pth"), patch_nums=[1, 2, 3, 4]).config.codebook_size == 64


@pytest.fixture
def drawn(tmp_path):
    """Two digits as files, a 3 and an 8, in colour and twice their size."""
    paths = []
    for digit in (3, 8):
        path = tmp_path / f"{digit}.png"
        assert main(["generate", "--class-labels", str(digit), "--resize", "32", "--output", str(path)]) == 0
        Image.open(path).convert("RGB").save(path)
        paths.append(str(path))
    return paths


def frames(path) -> int:
    return Image.open(path).n_frames


def test_gif_shows_every_scale(tmp_path):
    output = tmp_path / "digits.gif"
    assert main(["generate", "--class-labels", "3", "1", "--resize", "64", "--output", str(output)]) == 0
    # Equal frames are one that stays for longer.
    assert 2 <= frames(output) <= 8
    assert Image.open(output).size == (128, 64)


def test_inpaint_keeps_what_is_black(tmp_path, drawn):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 16, 32, 32))
    mask.save(tmp_path / "mask.png")
    arguments = ["inpaint", "--image", drawn[0], "--mask", str(tmp_path / "mask.png"), "--class-labels", "8", "9"]
    arguments += ["--output", str(tmp_path / "out.png"), "--paste-original", "--feather-width", "0"]
    assert main(arguments) == 0
    result = np.asarray(Image.open(tmp_path / "out.png").convert("L")).astype(int)
    assert result.shape == (16, 32)
    original = np.asarray(Image.open(drawn[0]).convert("L").resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    for left in (0, 16):
        assert np.abs(result[:8, left : left + 16] - original[:8]).max() <= 1
    assert np.abs(result[8:, :16] - result[8:, 16:]).max() > 30


def test_vary_keeps_the_coarse_scales(tmp_path, drawn, capsys):
    arguments = ["vary", "--image", drawn[0], "--class-labels", "3", "--num-images-per-label", "2", "--columns", "1"]
    outputs = [tmp_path / f"{strength}.png" for strength in (0, 1)]
    for strength, output in enumerate(outputs):
        assert main([*arguments, "--strength", str(strength), "--output", str(output)]) == 0
    kept, drawn_anew = (np.asarray(Image.open(output)).astype(int) for output in outputs)
    assert kept.shape[:2] == (32, 16)
    assert (kept[:16] == kept[16:]).all()
    assert not (drawn_anew[:16] == drawn_anew[16:]).all()
    assert main([*arguments, "--strength", "1", "--num-kept-scales", "1", "--output", str(outputs[0])]) == 2
    assert main([*arguments, "--strength", "2", "--output", str(outputs[0])]) == 2
    assert "strength" in capsys.readouterr().err


def test_score_prints_bits_or_classes(drawn, capsys):
    capsys.readouterr()
    assert main(["score", "--images", *drawn, "--class-label", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    bits = [float(re.search(r": ([\d.]+) bits per token; by scale: ([\d.]+ ){4}[\d.]+$", line)[1]) for line in lines]
    assert bits[0] < bits[1]
    assert main(["score", "--images", *drawn, "--classify", "2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"3\.png: 3 [01]\.\d+, \d [01]\.\d+$", first)
    assert re.search(r"8\.png: 8 ", second)
    assert main(["score", "--images", *drawn, "--classify", "0"]) == 2
    capsys.readouterr()
    assert main(["score", "--images", *drawn, "--prompt", "3", "8", "--model", DIGITS_CHECKPOINT]) == 0
    bits_of_both = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert main(["score", "--images", *drawn, "--prompt", "three", "--model", DIGITS_CHECKPOINT]) == 2
    assert "`prompt` has the unknown name 'three'" in capsys.readouterr().err
    assert main(["score", "--images", drawn[1], "--class-label", "8"]) == 0
    assert capsys.readouterr().out.split(": ")[1] == bits_of_both[1]


def test_prompts_of_a_model_of_classes_are_labels(tmp_path):
    pictures = [str(tmp_path / f"{name}.png") for name in ("label", "prompt")]
    assert main(["generate", "--class-labels", "3", "1", "--output", pictures[0]]) == 0
    assert main(["generate", "--prompt", "3", "1", "--model", DIGITS_CHECKPOINT, "--output", pictures[1]]) == 0
    assert np.array_equal(*(np.asarray(Image.open(picture)) for picture in pictures))


def test_score_prints_bits_of_texts_or_the_best_of_them(tmp_path, capsys):
    pictures = [str(tmp_path / f"{name}.png") for name in ("heart", "apple")]
    prompts = ["a red heart", "a green apple"]
    for picture, prompt in zip(pictures, prompts, strict=True):
        assert main(["generate", "--prompt", prompt, "--output", picture]) == 0
    capsys.readouterr()
    assert main(["score", "--images", *pictures, "--prompt", *prompts]) == 0
    right = [float(line.split(": ")[1].split(" bits per token")[0]) for line in capsys.readouterr().out.splitlines()]
    assert main(["score", "--images", *pictures, "--prompt", *prompts[::-1]]) == 0
    wrong = [float(line.split(": ")[1].split(" bits per token")[0]) for line in capsys.readouterr().out.splitlines()]
    assert right[0] < wrong[0]
    assert right[1] < wrong[1]
    assert main(["score", "--images", *pictures, "--prompt", *prompts, "--classify", "1"]) == 0
    heart, apple = capsys.readouterr().out.splitlines()
    assert "heart.png: a red heart " in heart
    assert "apple.png: a green apple " in apple


def deep(pixels):
    return Image.fromarray(pixels.astype(np.uint16) * 257)


def transparent(pixels):
    """Black ink that is the less opaque, the brighter the pixel is."""
    return Image.fromarray(np.stack([np.zeros_like(pixels), 255 - pixels], axis=-1), "LA")


def test_reconstruct_shows_originals_above(tmp_path, drawn):
    output = tmp_path / "both.png"
    assert main(["reconstruct", "--images", *drawn, "--output", str(output)]) == 0
    both = np.asarray(Image.open(output).convert("L")).astype(float)
    assert both.shape == (32, 32)
    assert np.abs(both[:16] - both[16:]).mean() < 20
    # The same pictures in 16 bits and behind transparency are shown as they are read.
    for name, picture in (("deep", deep), ("transparent", transparent)):
        others = []
        for path in drawn:
            others.append(str(tmp_path / f"{name}-{len(others)}.png"))
            picture(np.asarray(Image.open(path).convert("L"))).save(others[-1])
        assert main(["reconstruct", "--images", *others, "--output", str(tmp_path / f"{name}.png")]) == 0
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).astype(float), both)
    assert main(["reconstruct", "--images", *drawn, "--output", str(tmp_path / "both.gif")]) == 0
    assert frames(tmp_path / "both.gif") >= 2
    assert main(["reconstruct", "--images", str(tmp_path / "none.png"), "--output", str(output)]) == 2
