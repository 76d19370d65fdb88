# SPDX-License-Identifier: Apache-2.0
"""Edited images against the official implementation's numbers, which hold the raw draws at all positions."""

import pytest
import torch

from hf_var import VARInpaintPipeline
from hf_var.conversion import load_official_var, load_official_vqvae
from hf_var.pipelines.images import given_tokens
from parity import CASES, load_case
from pipelines.tiny import seeded


pytestmark = pytest.mark.parity

RUNS = [
    pytest.param(case, run, id=f"{case}-{run['name']}")
    for case in CASES
    for run in load_case(case).manifest["gen_runs"]
    if "edit" in run
]


def make_editor(name: str) -> VARInpaintPipeline:
    case = load_case(name)
    vqvae = load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums)
    pipe = VARInpaintPipeline(load_official_var(case.var_weights, **case.var_overrides), vqvae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def box_mask(box: dict, height: int, width: int) -> torch.Tensor:
    """The official box, whose bounds are shares of the image, as a mask: white is repainted."""
    mask = torch.full((height, width), 0.0 if box["inpainting"] else 1.0)
    rows = slice(round(box["y0"] * height), round(box["y1"] * height))
    columns = slice(round(box["x0"] * width), round(box["x1"] * width))
    mask[rows, columns] = 1.0 if box["inpainting"] else 0.0
    return mask


def test_there_are_runs():
    assert len(RUNS) == 3


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_given_tokens(name, run):
    case, config = load_case(name), make_editor(name).vqvae.config
    given = given_tokens(box_mask(run["edit"], *config.image_size)[None, None], config)[0]
    case.assert_close(f"gen/{run['name']}/keep_mask", given)
    height, width = config.latent_size
    case.assert_close(f"gen/{run['name']}/edit_mask", given[-height * width :].view(height, width))


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_edit(name, run):
    case, pipe, prefix = load_case(name), make_editor(name), f"gen/{run['name']}"
    given = case.expected[f"{prefix}/keep_mask"].bool()
    tokens = case.expected[f"{prefix}/tokens"].long()
    own = torch.where(given, case.expected["tok/idx"].long(), tokens)
    for output_type, expected in (("latent", "fhat"), ("pt", "image")):
        output = pipe(
            case.inputs["image"] / 2 + 0.5,
            box_mask(run["edit"], *pipe.vqvae.config.image_size),
            run["labels"],
            guidance_scale=run["cfg"] + 1,
            top_k=run["top_k"],
            top_p=run["top_p"],
            smooth=run["more_smooth"],
            generator=seeded(run["g_seed"]),
            output_type=output_type,
        )
        assert torch.equal(output.codes, own)
        assert not torch.equal(own, tokens)
        case.assert_close(f"{prefix}/{expected}", output.images)
