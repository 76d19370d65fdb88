# SPDX-License-Identifier: Apache-2.0
"""evaluate.py through its command line: the same images and metrics in one process, in two, and killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from hf_var import DIGITS_CHECKPOINT, VARPipeline
from hf_var.evaluation.generate import image_seed

from .conftest import REPOSITORY, load_script, run_script, script_environment, start, wait_for


SCRIPT = "examples/evaluate.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EXTRACTOR = ["--feature_extractor", "extractor:RandomFeatures"]

evaluate = load_script(SCRIPT)


def read_report(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").glob("*.png"))}


@pytest.fixture(scope="module", autouse=True)
def extractors_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """300 random images of the digits' size, as a folder."""
    config = VARPipeline.from_pretrained(DIGITS_CHECKPOINT).vqvae.config
    folder = tmp_path_factory.mktemp("reference")
    random = np.random.default_rng(0)
    for number in range(300):
        pixels = random.integers(0, 256, (*config.image_size, 1), dtype=np.uint8).repeat(3, axis=2)
        PILImage.fromarray(pixels).save(folder / f"{number:03d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def arguments(digits: str) -> list[str]:
    sampling = ["--model", str(DIGITS_CHECKPOINT), "--num_images", "200", "--seed", "3"]
    return [*sampling, "--batch_size", "16", "--reference", digits, *EXTRACTOR]


@pytest.fixture(scope="module")
def evaluated(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate.main([*arguments, "--output_dir", str(folder)])
    return folder


def test_each_image_is_what_the_pipeline_draws_with_its_seed(evaluated: Path) -> None:
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    assert len(pictures(evaluated)) == 200
    for number in (0, 17, 199):
        generator = torch.Generator().manual_seed(image_seed(3, number))
        drawn = pipe(number % 10, generator=generator, output_type="np").images[0]
        found = np.asarray(PILImage.open(evaluated / "images" / f"{number:06d}.png"))
        assert found.shape == (*drawn.shape[:2], 3)
        assert np.abs(found - np.round(drawn * 255)).max() <= 1
    stacked = np.load(evaluated / "samples.npz")["arr_0"]
    assert np.array_equal(stacked[17], np.asarray(PILImage.open(evaluated / "images" / "000017.png")))


def test_the_report_holds_all_metrics_and_settings(evaluated: Path) -> None:
    report = read_report(evaluated)
    names = {"fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std"}
    assert report["metrics"].keys() == names
    assert all(np.isfinite(value) for value in report["metrics"].values())
    assert report["metrics"]["fid"] > 0.1
    assert report["settings"]["guidance_scale"] == VARPipeline.from_pretrained(DIGITS_CHECKPOINT).config.guidance_scale
    assert report["settings"]["seed"] == 3
    assert report["settings"]["num_images"] == 200
    assert report["seconds"] > 0
    assert str(evaluated) not in (evaluated / "evaluation.md").read_text()


@pytest.mark.parametrize("batch_size", ["7", "64"])
def test_images_do_not_depend_on_the_batch_size(
    tmp_path: Path, arguments: list[str], evaluated: Path, batch_size: str
) -> None:
    evaluate.main([*arguments, "--batch_size", batch_size, "--output_dir", str(tmp_path)])
    assert pictures(tmp_path) == pictures(evaluated)
    assert read_report(tmp_path)["metrics"] == pytest.approx(read_report(evaluated)["metrics"], rel=1e-5)


def test_two_processes_make_what_one_makes(tmp_path: Path, arguments: list[str], evaluated: Path) -> None:
    command = [sys.executable, *TORCHRUN, str(REPOSITORY / SCRIPT), *arguments, "--output_dir", str(tmp_path)]
    environment = script_environment(ACCELERATE_USE_CPU="true")
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert pictures(tmp_path) == pictures(evaluated)
    assert (tmp_path / "samples.npz").read_bytes() == (evaluated / "samples.npz").read_bytes()
    assert read_report(tmp_path)["metrics"] == read_report(evaluated)["metrics"]


def test_a_killed_run_goes_on(tmp_path: Path, arguments: list[str], evaluated: Path) -> None:
    process = start(SCRIPT, arguments, tmp_path)
    wait_for(lambda: len(list((tmp_path / "images").glob("*.png"))) >= 40, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("*.png")}
    assert 40 <= len(before) < 200
    run_script(SCRIPT, *arguments, "--output_dir", str(tmp_path))
    # What was there is not drawn again.
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in before.items())
    assert pictures(tmp_path) == pictures(evaluated)
    assert read_report(tmp_path)["metrics"] == read_report(evaluated)["metrics"]


def test_a_broken_picture_is_found_and_drawn_again_once_it_is_deleted(
    tmp_path: Path, arguments: list[str], evaluated: Path
) -> None:
    few = [*arguments, "--num_images", "40", "--output_dir", str(tmp_path)]
    evaluate.main(few)
    metrics = read_report(tmp_path)["metrics"]
    path = tmp_path / "images" / "000023.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="000023.png' is damaged.*Delete it"):
        evaluate.main(few)
    path.unlink()
    evaluate.main(few)
    assert pictures(tmp_path) == {name: content for name, content in pictures(evaluated).items() if name < "000040"}
    assert read_report(tmp_path)["metrics"] == metrics


def test_other_arguments_need_another_folder(tmp_path: Path, arguments: list[str]) -> None:
    few = [*arguments, "--num_images", "20", "--output_dir", str(tmp_path)]
    evaluate.main(few)
    with pytest.raises(ValueError, match="`guidance_scale` was .* when the files .* were begun, got 1.5"):
        evaluate.main([*few, "--guidance_scale", "1.5"])
    # Another extractor needs no other images.
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("*.png")}
    evaluate.main([*few, "--feature_extractor", "extractor:CoarsePixels"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").glob("*.png")} == drawn
    assert "inception_score" not in read_report(tmp_path)["metrics"]


def test_existing_images_have_the_same_metrics(tmp_path: Path, digits: str, evaluated: Path) -> None:
    expected = read_report(evaluated)["metrics"]
    for source in (evaluated / "samples.npz", evaluated / "images"):
        folder = tmp_path / source.name
        evaluate.main(["--samples", str(source), "--reference", digits, *EXTRACTOR, "--output_dir", str(folder)])
        assert read_report(folder)["metrics"] == pytest.approx(expected, rel=1e-6)
        assert not (folder / "images").exists()


def test_stored_moments_serve_as_a_reference(tmp_path: Path, digits: str, evaluated: Path) -> None:
    from extractor import RandomFeatures

    images = np.stack([np.asarray(PILImage.open(path)) for path in sorted(Path(digits).glob("*.png"))])
    with torch.no_grad():
        outputs = RandomFeatures().outputs(torch.from_numpy(images).permute(0, 3, 1, 2))
    moments = {}
    for name, feature in (("", "features"), ("_s", "spatial_features")):
        values = outputs[feature].double().numpy()
        moments |= {f"mu{name}": values.mean(axis=0), f"sigma{name}": np.cov(values, rowvar=False)}
    # As in the published files: a part of the images beside the moments of all.
    np.savez(tmp_path / "reference.npz", arr_0=images[:50], **moments)
    samples = ["--samples", str(evaluated / "samples.npz"), *EXTRACTOR]
    evaluate.main([*samples, "--reference", str(tmp_path / "reference.npz"), "--output_dir", str(tmp_path / "a")])
    metrics, expected = read_report(tmp_path / "a")["metrics"], read_report(evaluated)["metrics"]
    for name in ("fid", "sfid", "inception_score"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert metrics["kid"] != expected["kid"]
    wrong = ["--reference", str(tmp_path / "reference.npz"), "--feature_extractor", "extractor:CoarsePixels"]
    with pytest.raises(ValueError, match="moments 'mu' of 6 features, but the feature extractor gives 12"):
        evaluate.main([*samples[:2], *wrong, "--output_dir", str(tmp_path / "b")])


def test_a_tokenizer_is_evaluated(tmp_path: Path, digits: str) -> None:
    arguments = ["--model", str(Path(DIGITS_CHECKPOINT) / "vqvae"), "--reference", digits, *EXTRACTOR]
    evaluate.main([*arguments, "--num_images", "50", "--batch_size", "7", "--output_dir", str(tmp_path / "one")])
    metrics = read_report(tmp_path / "one")["metrics"]
    assert {"psnr", "ssim", "rfid", "usage_0"} <= metrics.keys()
    assert 0 < metrics["psnr"] < 40
    assert metrics["rfid"] > 0
    assert read_report(tmp_path / "one")["settings"]["num_images"] == 50


def test_samples_and_tokenizers_take_no_arguments_of_sampling(tmp_path: Path, digits: str) -> None:
    folder = ["--output_dir", str(tmp_path), "--reference", digits]
    with pytest.raises(ValueError, match="`seed` = 4 has no meaning here: `samples` exist already"):
        evaluate.main(["--samples", digits, "--seed", "4", *folder])
    tokenizer = str(Path(DIGITS_CHECKPOINT) / "vqvae")
    with pytest.raises(ValueError, match="`top_p` = 0.5 has no meaning here: `model` is a tokenizer"):
        evaluate.main(["--model", tokenizer, "--top_p", "0.5", *EXTRACTOR, *folder])


def test_a_gray_tokenizer_sees_the_same_in_every_batch(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    images[::2] = images[::2, ..., :1]
    np.savez(tmp_path / "mixed.npz", arr_0=images)
    arguments = ["--model", str(Path(DIGITS_CHECKPOINT) / "vqvae"), "--reference", str(tmp_path / "mixed.npz")]
    found = []
    for batch_size in ("1", "24"):
        folder = tmp_path / batch_size
        evaluate.main([*arguments, *EXTRACTOR, "--batch_size", batch_size, "--output_dir", str(folder)])
        found.append(read_report(folder)["metrics"])
    assert found[0]["psnr"] == pytest.approx(found[1]["psnr"], rel=1e-5)


def test_an_extractor_that_changed_without_weights_has_other_features(
    tmp_path: Path, digits: str, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extractor import CoarsePixels

    arguments = ["--samples", str(evaluated / "samples.npz"), "--reference", digits, "--output_dir", str(tmp_path)]
    arguments += ["--feature_extractor", "extractor:CoarsePixels"]
    evaluate.main(arguments)
    before = read_report(tmp_path)["metrics"]["fid"]
    forward = CoarsePixels.forward
    monkeypatch.setattr(CoarsePixels, "forward", lambda self, images: 2 * forward(self, images))
    evaluate.main(arguments)
    assert read_report(tmp_path)["metrics"]["fid"] == pytest.approx(4 * before, rel=1e-5)


def test_references_of_one_name_at_two_addresses_are_two(
    tmp_path: Path, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_var.evaluation.run.HF_HOME", str(tmp_path / "home"))
    found = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        images = np.random.default_rng(seed).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / "reference.npz", arr_0=images)
        source = (folder / "reference.npz").as_uri()
        arguments = ["--samples", str(evaluated / "samples.npz"), "--reference", source, *EXTRACTOR]
        evaluate.main([*arguments, "--output_dir", str(folder / "out")])
        found.append(read_report(folder / "out")["metrics"]["fid"])
    assert found[0] != found[1]
    with pytest.raises(ValueError, match="cannot be downloaded"):
        evaluate.main([*arguments[:3], (tmp_path / "no.npz").as_uri(), *EXTRACTOR, "--output_dir", str(tmp_path)])


@pytest.mark.gpu
def test_an_accelerator_draws_the_same_set_again(tmp_path: Path, arguments: list[str]) -> None:
    few = [*arguments, "--num_images", "40"]
    for name in ("first", "second"):
        evaluate.main([*few, "--output_dir", str(tmp_path / name)])
    assert pictures(tmp_path / "first") == pictures(tmp_path / "second")
    assert read_report(tmp_path / "first")["metrics"] == read_report(tmp_path / "second")["metrics"]


def test_rejection_sampling_keeps_what_the_classifier_likes(
    tmp_path: Path, arguments: list[str], evaluated: Path
) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=10)
    classifier = ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.normal_(std=0.5)
    classifier.save_pretrained(tmp_path / "classifier")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "classifier")
    few = [*arguments, "--num_images", "40", "--classifier", str(tmp_path / "classifier"), "--num_candidates", "4"]
    evaluate.main([*few, "--output_dir", str(tmp_path / "best")])
    assert read_report(tmp_path / "best")["settings"]["num_candidates"] == 4

    @torch.no_grad()
    def confidence(folder: Path) -> float:
        images = [PILImage.open(folder / "images" / f"{number:06d}.png") for number in range(40)]
        shares = classifier(**processor(images, return_tensors="pt")).logits.log_softmax(dim=1)
        return shares[torch.arange(40), torch.arange(40) % 10].mean().item()

    assert confidence(tmp_path / "best") > confidence(evaluated) + 0.05
    # The set still depends on nothing but the seed.
    evaluate.main([*few, "--batch_size", "9", "--output_dir", str(tmp_path / "again")])
    assert pictures(tmp_path / "again") == pictures(tmp_path / "best")
    # Other weights under the same name would draw other images.
    with torch.no_grad():
        classifier.classifier[1].bias.add_(torch.arange(10.0))
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"`classifier_weights` was .* when the files"):
        evaluate.main([*few, "--output_dir", str(tmp_path / "again")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--preset", "imagenet512"], "`preset` = 'imagenet512' is for images of"),
        (["--num_images", "1"], "`num_images` must be above 3, got 1"),
        (["--samples", "somewhere"], "Give one of `model` and `samples`"),
        (["--classifier", "somewhere"], "`classifier` and `num_candidates` above 1 go together"),
        (["--model", "nowhere"], "`model` = 'nowhere' is neither a pipeline nor a tokenizer"),
        (["--top_k", "100000"], "`top_k` must be from 1"),
        (["--dtype", "int8"], "`dtype` must be one of float32"),
        (["--lpips_weights", "random"], "`lpips_weights` = 'random' has no meaning here: `model` is a pipeline"),
        (["--push_to_hub"], "`push_to_hub` needs the repository's name in `hub_model_id`"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: list[str], changed: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.main([*arguments, *changed, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_reference_of_another_size_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((5, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="must have images of .* pixels, has 4x4"):
        evaluate.main([*arguments, "--reference", str(tmp_path / "small.npz"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
