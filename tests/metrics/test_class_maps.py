# SPDX-License-Identifier: Apache-2.0
"""Metrics and colours of class maps."""

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.autoencoders.class_maps import as_class_ids, as_one_hot, one_hot
from hf_var.metrics.class_maps import ClassMapMetrics, class_colors
from hf_var.metrics.reconstruction import measure_reconstruction


def test_forms_of_a_map() -> None:
    ids = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.one_hot(ids, 5).movedim(-1, 1).float()
    for kind in (torch.int64, torch.int16, torch.uint8):
        assert torch.equal(one_hot(ids.to(kind), 5), expected)
        assert torch.equal(as_one_hot(ids.to(kind), 5), expected)
        assert torch.equal(as_class_ids(ids.to(kind)), ids)
    assert as_one_hot(expected, 5) is expected
    assert torch.equal(as_class_ids(expected * 3 - 1), ids)


@pytest.mark.parametrize(
    "form", [lambda ids: ids.to(torch.int16), lambda ids: one_hot(ids, 3)], ids=["ids", "one-hot"]
)
def test_metrics_by_hand(form) -> None:
    ids = torch.tensor([[[0, 0, 1, 1]], [[1, 1, 1, 1]]])
    predicted = torch.tensor([[[0, 1, 1, 1]], [[1, 1, 0, 1]]])
    metrics = ClassMapMetrics(3)
    for target, found in zip(ids.split(1), predicted.split(1), strict=True):
        metrics.update(form(target), one_hot(found, 3) * 4 - 9)
    # Class 0: 1 pixel in common of 3; class 1: 5 of 7; class 2 is nowhere.
    expected = {"pixel_accuracy": 6 / 8, "mean_iou": (1 / 3 + 5 / 7) / 2}
    assert metrics.compute() == pytest.approx(expected)


def test_metrics_need_maps() -> None:
    with pytest.raises(ValueError, match="need at least 1 validation"):
        ClassMapMetrics(3).compute()


def test_colours_are_those_of_pascal_voc() -> None:
    ids = torch.tensor([[[0, 1, 2, 3], [4, 15, 20, 255]]])
    colors = ((class_colors(ids) + 1) * 127.5).round().int().movedim(1, -1)[0]
    assert colors[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert colors[1].tolist() == [[0, 0, 128], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    every = class_colors(torch.arange(256).view(1, 1, 256))[0, :, 0].T
    assert len(every.unique(dim=0)) == 256
    assert torch.equal(class_colors(torch.tensor([[[256]]])), class_colors(torch.tensor([[[0]]])))
    # As of logits.
    assert torch.equal(class_colors(one_hot(ids, 256)), class_colors(ids))


def test_a_tokenizer_of_class_maps_is_measured() -> None:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    fields = {"in_channels": 4, "sample_type": "class_map", "latent_channels": 4, "codebook_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae = VQVAEModel(VQVAEConfig(**sizes, **fields, patch_nums=(2, 4)))
    ids = torch.randint(4, (6, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    batches = [{"pixel_values": part} for part in ids.split(4)]
    values, plots = measure_reconstruction(vqvae, batches, Accelerator(cpu=True))
    with torch.no_grad():
        found = vqvae.eval().decode(vqvae.encode(ids).codes).sample.argmax(dim=1)
    assert values["pixel_accuracy"] == pytest.approx((found == ids).float().mean().item())
    assert 0 < values["mean_iou"] < 1
    assert {"usage", "usage_1", "residual_energy_1"} <= values.keys()
    assert "psnr" not in values
    # Two scales and the original of four maps, of 8 pixels enlarged eight times.
    grid = plots["reconstructions"]
    assert isinstance(grid, Image.Image)
    assert grid.size == (3 * 66 + 2, 4 * 66 + 2)
    shown = {tuple(color) for _, color in grid.getcolors(10_000)}
    assert shown <= {(255, 255, 255), (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)}
    assert len(shown) == 5
