# SPDX-License-Identifier: Apache-2.0
"""`hf-var evaluate` and `hf-var tokenize`: their arguments in any spelling, and errors of a single line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hf_var import DIGITS_CHECKPOINT
from hf_var.cli import jobs, main


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def reference(tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", arr_0=random.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    return str(tmp_path / "reference.npz")


def test_evaluate_takes_both_spellings_and_a_recipe(reference: str, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {DIGITS_CHECKPOINT}\nnum_images: 7\nfeature_extractor: {__name__}:Means\n")
    command = ["evaluate", str(recipe), "--num-images", "8", "--batch_size", "4", "--reference", reference]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert "| FID, lower is better |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["settings"]["num_images"] == 8
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "`model` = 'nowhere' is neither a pipeline nor a tokenizer"),
        (
            ["--model", "nowhere", "--num-image", "8"],
            "Unknown argument 'num-image' in the command line. Did you mean num_images",
        ),
        (["--model", "nowhere", "--num-images", "eight"], "invalid int value: 'eight'"),
        (["--model", "nowhere", "--batch-size", "0"], "`batch_size` must be at least 1, got 0"),
        ([], "Give one of `model` and `samples`"),
    ],
)
def test_errors_of_evaluate_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("hf-var evaluate: ")
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "pushed", "repository"),
    [
        ([], False, None),
        (["--push-to-hub"], True, None),
        (["--push_to_hub", "true"], True, None),
        (["--push-to-hub", "--license", "cc0-1.0"], True, None),
        (["--push-to-hub", "user/codes"], True, "user/codes"),
        (["--push-to-hub=user/codes"], True, "user/codes"),
        (["--push_to_hub", "--hub_dataset_id", "user/codes"], True, "user/codes"),
    ],
)
def test_a_repository_may_follow_push_to_hub(
    words: list[str], pushed: bool, repository: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def stop(config, accelerator):
        found.append(config)
        raise ValueError("far enough")

    monkeypatch.setattr("hf_var.data.tokenization.tokenize_dataset", stop)
    with pytest.raises(ValueError, match="far enough"):
        jobs.tokenize(["--data", "user/images", "--vqvae", "user/vqvae", "--output", "codes", *words])
    assert (found[0].push_to_hub, found[0].hub_dataset_id, found[0].output_dir) == (pushed, repository, "codes")
