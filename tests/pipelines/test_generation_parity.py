# SPDX-License-Identifier: Apache-2.0
"""Generated images and the sampling filters against the official implementation's numbers."""

import pytest
import torch

from hf_var import VARPipeline
from hf_var.conversion import load_official_var, load_official_vqvae
from hf_var.pipelines.sampling import apply_guidance, filter_logits, guidance_weight
from parity import CASES, load_case
from pipelines.tiny import seeded


pytestmark = pytest.mark.parity

RUNS = [
    pytest.param(case, run, id=f"{case}-{run['name']}")
    for case in CASES
    for run in load_case(case).manifest["gen_runs"]
    if "edit" not in run
]
GREEDY = [parameters for parameters in RUNS if parameters.values[1].get("save_logits")]
FILTERS = [tuple(pair) for pair in load_case("A").manifest["sampler_pairs"]]


@pytest.fixture(scope="module")
def pipelines() -> dict[str, VARPipeline]:
    made = {}
    for name in CASES:
        case = load_case(name)
        vqvae = load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums)
        made[name] = VARPipeline(load_official_var(case.var_weights, **case.var_overrides), vqvae)
        made[name].set_progress_bar_config(disable=True)
    return made


def draw_labels(run: dict, num_labels: int, generator: torch.Generator) -> torch.Tensor:
    """The labels of a run; the official code draws missing ones, from the generator that then draws the codes."""
    if run["labels"] is None:
        return torch.multinomial(torch.ones(num_labels), run["batch"], replacement=True, generator=generator)
    if run["labels"] == -1:
        return torch.full((run["batch"],), -1)
    return torch.tensor(run["labels"])


def generate(pipe: VARPipeline, run: dict, output_type: str):
    generator = seeded(run["g_seed"])
    return pipe(
        draw_labels(run, pipe.transformer.config.num_labels, generator),
        guidance_scale=run["cfg"] + 1,
        top_k=run["top_k"],
        top_p=run["top_p"],
        smooth=run["more_smooth"],
        generator=generator,
        output_type=output_type,
    )


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_generation(pipelines, name, run):
    case, pipe, prefix = load_case(name), pipelines[name], f"gen/{run['name']}"
    latents = generate(pipe, run, "latent")
    case.assert_close(f"{prefix}/tokens", latents.codes)
    case.assert_close(f"{prefix}/fhat", latents.images)
    images = generate(pipe, run, "pt")
    case.assert_close(f"{prefix}/tokens", images.codes)
    case.assert_close(f"{prefix}/image", images.images)


@pytest.mark.parametrize(("name", "run"), GREEDY)
def test_guided_logits_of_every_scale(pipelines, name, run):
    pipe, seen = pipelines[name], []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    try:
        generate(pipe, run, "latent")
    finally:
        handle.remove()
    guided = [apply_guidance(logits, guidance_weight(run["cfg"] + 1, k, len(seen))) for k, logits in enumerate(seen)]
    load_case(name).assert_close(f"gen/{run['name']}/logits", torch.cat(guided, dim=1))


def test_missing_labels_are_the_official_ones():
    case = load_case("A")
    (run,) = (run for run in case.manifest["gen_runs"] if run["name"] == "random_labels")
    case.assert_close("gen/random_labels/labels_used", draw_labels(run, 10, seeded(run["g_seed"])))


@pytest.mark.parametrize("name", CASES)
def test_guidance_depth_of_every_scale(name):
    depths = load_case(name).manifest["derived"]["cfg_ratio_per_scale"]
    weights = [guidance_weight(2.0, k, len(depths)) for k in range(len(depths))]
    assert weights == pytest.approx([1 + depth for depth in depths])


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_filters(top_k, top_p):
    case = load_case("A")
    probabilities = filter_logits(case.inputs["sampler_logits"], top_k, top_p).softmax(-1)
    case.assert_close(f"sampler/probs_k{top_k}_p{top_p}", probabilities)
    support = case.expected[f"sampler/probs_k{top_k}_p{top_p}"] > 0
    assert torch.equal(probabilities > 0, support)
