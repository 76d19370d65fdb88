# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of class maps through its command line."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Array2D, Dataset, Features
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from hf_var import VQVAEModel
from hf_var.conversion import export_taming_vqgan, load_taming_vqgan

from .conftest import NUM_CLASSES, SHORT_RUN, class_maps, load_script, losses, read_log, run_script


train_vqvae = load_script("examples/train_vqvae.py")

TINY = [
    *("--sample_type", "class_map", "--in_channels", str(NUM_CLASSES), "--base_channels", "32"),
    *("--channel_multipliers", "1", "2", "--num_res_blocks", "1", "--latent_channels", "4", "--codebook_size", "16"),
    *("--patch_nums", "4", "--refinement_ratio", "0", "--quant_conv_kernel_size", "1"),
]
OBJECTIVE = ["--l2_weight", "0", "--bce_weight", "1"]


def test_a_segmentation_is_learned_resumed_and_tokenized(tmp_path: Path, maps_parquet: str) -> None:
    data = ["--train_data", maps_parquet, "--validation_data", maps_parquet, *TINY, *OBJECTIVE, *SHORT_RUN]
    data += ["--kmeans_images", "24", "--unquantized_steps", "10", "--learning_rate", "2e-3", "--resize_ratio", "1"]
    data += [
        "--restart_until",
        "0.5",
        "--codebook_window",
        "10",
        "--train_batch_size",
        "8",
        "--horizontal_flip",
        "true",
    ]
    data += ["--max_train_steps", "100", "--checkpointing_steps", "80"]
    train_vqvae.main([*data, "--output_dir", str(tmp_path / "whole")])
    log = read_log(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < 0.6 * losses(tmp_path / "whole")[0]
    # The likeliest class alone gives 0.29 and 0.06.
    assert log[-1]["validation_pixel_accuracy"] > 0.6
    assert log[-1]["validation_mean_iou"] > 0.4
    assert "validation_psnr" not in log[-1]
    for name in ("reconstructions.png", "codes.png", "curves.png", "README.md"):
        assert (tmp_path / "whole" / name).is_file(), name
    colors = Image.open(tmp_path / "whole/reconstructions.png").getcolors(10_000)
    assert {(0, 0, 0), (128, 0, 0), (0, 128, 0)} <= {color for _, color in colors}
    card = ModelCard.load(tmp_path / "whole/README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["mean_iou"] == pytest.approx(log[-1]["validation_mean_iou"], abs=1e-4)
    assert "of maps of 5 classes" in card.text
    (example,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(re.sub(r'from_pretrained\(".*?"\)', f"from_pretrained({str(tmp_path / 'whole')!r})", example), {})

    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole/checkpoints/step-00000080").rename(tmp_path / "step-00000080")
    arguments = [*data, "--output_dir", str(tmp_path / "resumed")]
    train_vqvae.main([*arguments, "--resume_from_checkpoint", str(tmp_path / "step-00000080")])
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    codes = tmp_path / "codes"
    folder = ["--vqvae", str(tmp_path / "whole"), "--resize_ratio", "1", "--output_dir", str(codes)]
    run_script("examples/tokenize_dataset.py", "--data", maps_parquet, *folder)
    rows = Dataset.from_parquet(str(codes / "*.parquet"))
    vqvae = VQVAEModel.from_pretrained(tmp_path / "whole")
    expected = vqvae.encode(torch.from_numpy(class_maps())).codes
    assert torch.equal(torch.tensor(rows["codes"][:]), expected)


def test_a_converted_segmentation_model_is_tuned_on_arrays(tmp_path: Path, maps_parquet: str) -> None:
    train_vqvae.main(
        ["--train_data", maps_parquet, *TINY, *OBJECTIVE, *SHORT_RUN, "--output_dir", str(tmp_path / "a")]
    )
    official = export_taming_vqgan(VQVAEModel.from_pretrained(tmp_path / "a"))
    load_taming_vqgan(official, patch_nums=[4]).save_pretrained(tmp_path / "converted")
    features = Features({"ids": Array2D((8, 8), "uint8")})
    Dataset.from_dict({"ids": class_maps().tolist()}, features=features).to_parquet(tmp_path / "ids.parquet")
    tuned = ["--pretrained_vqvae", str(tmp_path / "converted"), *OBJECTIVE, *SHORT_RUN, "--learning_rate", "1e-9"]
    streamed = ["--train_data", str(tmp_path / "ids.parquet"), "--streaming", "true", "--channels_last", "true"]
    train_vqvae.main([*tuned, *streamed, "--output_dir", str(tmp_path / "tuned")])
    exported = export_taming_vqgan(VQVAEModel.from_pretrained(tmp_path / "tuned"))
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight"):
        torch.testing.assert_close(exported[name], official[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bce_weight", "0", "--l2_weight", "1"], "`bce_weight` must be positive with .*'class_map', got 0.0"),
        (["--l2_weight", "1"], "`l2_weight` must be 0.0 with sample_type='class_map', whose samples are logits"),
        (["--l1_weight", "0.5"], "`l1_weight` must be 0.0 with .* got 0.5"),
        (["--lpips_weight", "1"], "`lpips_weight` must be 0.0 with .* got 1.0"),
        (["--lpips_weights", "random"], "`lpips_weights` must be None with .* got 'random'"),
        (["--adversarial_weight", "0.8"], "`adversarial_weight` must be 0.0 with .* got 0.8"),
        (["--image_range", "0", "9"], r"`image_range` must be None with .* got \[0.0, 9.0\]"),
        (["--sample_type", "image", "--in_channels", "1"], "`bce_weight` must be 0.0 for .* images, got 1.0"),
        (["--in_channels", "1"], "`in_channels` must be the number of classes"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_class_maps(
    arguments: list[str], message: str, tmp_path: Path, maps_parquet: str
) -> None:
    run = ["--train_data", maps_parquet, *TINY, *OBJECTIVE, *SHORT_RUN, *arguments]
    with pytest.raises(ValueError, match=message):
        train_vqvae.main([*run, "--output_dir", str(tmp_path / "no")])
    assert not (tmp_path / "no").exists()


def test_rfid_needs_images(tmp_path: Path, maps_parquet: str) -> None:
    run = ["--train_data", maps_parquet, "--validation_data", maps_parquet, *TINY, *OBJECTIVE, *SHORT_RUN]
    with pytest.raises(ValueError, match="`rfid_extractor` must be None with sample_type='class_map'"):
        train_vqvae.main([*run, "--rfid_extractor", "inception", "--output_dir", str(tmp_path / "no")])


def test_ids_out_of_range_end_the_run(tmp_path: Path, maps_parquet: str) -> None:
    run = ["--train_data", maps_parquet, *TINY, *OBJECTIVE, *SHORT_RUN, "--in_channels", "3"]
    with pytest.raises(ValueError, match="class ids must be from 0 to 2, got [34]"):
        train_vqvae.main([*run, "--max_train_steps", "200", "--output_dir", str(tmp_path / "out")])
