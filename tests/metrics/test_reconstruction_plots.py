# SPDX-License-Identifier: Apache-2.0
"""Pictures of a tokenizer, read back pixel by pixel and bar by bar."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import VQVAEConfig, VQVAEModel
from hf_var.metrics.feature_extractors import rgb_bytes
from hf_var.metrics.reconstruction_plots import reconstruction_grid, usage_plot


def make_vqvae(**config) -> VQVAEModel:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    defaults = {"latent_channels": 4, "codebook_size": 32, "patch_nums": (1, 2, 4), "dropout": 0.5}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        vqvae = VQVAEModel(VQVAEConfig(**sizes | defaults | config))
        vqvae.quantizer.codebook.weight.normal_()
        vqvae.encoder.conv_out.weight.mul_(4)
        vqvae.quant_conv.weight.mul_(3)
        vqvae.decoder.conv_out.weight.mul_(2)
    return vqvae.eval()


def make_images(vqvae: VQVAEModel, number: int = 2) -> torch.Tensor:
    shape = (number, vqvae.config.in_channels, *vqvae.config.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tiles(picture: Image.Image, rows: int, columns: int, factor: int) -> np.ndarray:
    """The cells of a grid at their original size, and a check that all pixels were repeated."""
    pixels = np.asarray(picture)
    height, width = (pixels.shape[0] - 2) // rows, (pixels.shape[1] - 2) // columns
    cells = [
        [
            pixels[2 + row * height : (row + 1) * height, 2 + column * width : (column + 1) * width]
            for column in range(columns)
        ]
        for row in range(rows)
    ]
    small = np.array(cells)[:, :, ::factor, ::factor]
    assert np.array_equal(small.repeat(factor, axis=2).repeat(factor, axis=3), cells)
    return small  # (rows, columns, height, width, 3)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 8),
        ({"in_channels": 1}, 8),
        ({"in_channels": 4}, 8),
        ({"in_channels": 2, "out_channels": 3}, 8),
        ({"patch_nums": (4,)}, 8),
        ({"patch_nums": ((1, 2), (4, 8))}, 8),
        ({"patch_nums": (2, 20)}, 2),
        ({"patch_nums": (1, 48), "channel_multipliers": (1, 1)}, 1),
    ],
)
@torch.no_grad()
def test_rows_lead_from_the_first_scale_to_the_original(config: dict, factor: int) -> None:
    vqvae = make_vqvae(**config)
    images = make_images(vqvae)
    codes = vqvae.encode(images).codes
    num_scales = len(vqvae.config.patch_nums)
    expected = [vqvae.decode(codes, num_scales=number).sample for number in range(1, num_scales + 1)]
    expected = torch.stack([rgb_bytes(stage) for stage in (*expected, images)], dim=1).permute(0, 1, 3, 4, 2).numpy()
    found = tiles(reconstruction_grid(vqvae, images), 2, num_scales + 1, factor)
    assert np.array_equal(found, expected)
    for column in range(num_scales):
        assert not np.array_equal(found[:, column], found[:, column + 1])


def test_grid_is_drawn_without_dropout_and_modes_are_put_back() -> None:
    vqvae = make_vqvae()
    images = make_images(vqvae)
    expected = np.asarray(reconstruction_grid(vqvae, images))
    vqvae.train()
    vqvae.encoder.eval()
    modes = [module.training for module in vqvae.modules()]
    assert np.array_equal(reconstruction_grid(vqvae, images), expected)
    assert [module.training for module in vqvae.modules()] == modes


def test_usage_plot_shows_all_figures_of_every_scale(tmp_path) -> None:
    figure = usage_plot((1, (2, 3), 4), [0.1, 0.5, 1.0], [0.05, 0.4, 0.9], [0.2, 0.6, 0.99])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1x1", "2x3", "4x4"]
    assert [bar.get_height() for bar in axes.patches] == [0.1, 0.5, 1.0, 0.05, 0.4, 0.9]
    (marks,) = axes.lines
    assert list(marks.get_ydata()) == [0.2, 0.6, 0.99]
    low, high = axes.get_ylim()
    assert low == 0
    assert high > 1
    figure.savefig(tmp_path / "usage.png")
    assert np.asarray(Image.open(tmp_path / "usage.png")).std() > 10
    with pytest.raises(ValueError, match="`perplexity`.*2 scales, got 1"):
        usage_plot((1, 2), [0.1, 0.2], [0.1], [0.1, 0.2])
