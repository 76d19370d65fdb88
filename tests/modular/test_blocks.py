# SPDX-License-Identifier: Apache-2.0
"""Blocks and workflows: loading, saving, refusals, and blocks of others among ours."""

import json

import pytest
import torch
from diffusers import ComponentSpec, InputParam, ModularPipeline, ModularPipelineBlocks, OutputParam
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig

from hf_var import (
    DIGITS_CHECKPOINT,
    EMOJI_CHECKPOINT,
    VARAutoBlocks,
    VARInpaintPipeline,
    VARModularPipeline,
    VARPipeline,
    VARTextAutoBlocks,
    VARTextModularPipeline,
    VARTextToImagePipeline,
    VARTransformer,
)
from hf_var.modular import VARClassStep, VARDecodeStep, VARScaleLoop, VARTextEncoderStep
from modular.blocks import draw, modular_of
from pipelines.texts import PROMPTS, make_text_pipeline
from pipelines.tiny import make_pipeline, make_transformer, make_vqvae, seeded


IMAGE = torch.rand(3, 8, 8, generator=seeded(5))
LABELS = {"class_labels": [3, 1], "output_type": "pt"}


def loaded(folder, **options) -> ModularPipeline:
    pipe = ModularPipeline.from_pretrained(folder, **options)
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("pipeline_class", [VARPipeline, VARInpaintPipeline])
def test_a_folder_of_a_pipeline_is_loaded(tmp_path, pipeline_class):
    pipe = make_pipeline()
    pipeline_class.from_pipe(pipe).save_pretrained(tmp_path)
    found = loaded(tmp_path)
    assert type(found) is VARModularPipeline
    assert torch.equal(draw(found, **LABELS, generator=seeded())[0], pipe(**LABELS, generator=seeded()).images)


@pytest.mark.parametrize(
    ("folder", "pipeline_class", "modular_class", "inputs"),
    [
        (DIGITS_CHECKPOINT, VARPipeline, VARModularPipeline, {"class_labels": [3, 8]}),
        (EMOJI_CHECKPOINT, VARTextToImagePipeline, VARTextModularPipeline, {"prompt": ["red heart", "cat"]}),
    ],
    ids=["digits", "emoji"],
)
def test_the_embedded_checkpoints(folder, pipeline_class, modular_class, inputs, caplog):
    """Also their defaults are theirs, and a component that a folder does not have is not looked for."""
    found = loaded(folder)
    assert type(found) is modular_class
    assert not [record for record in caplog.records if "Failed" in record.getMessage()]
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**inputs, generator=seeded(), output_type="pt")
    images, codes = draw(found, **inputs, generator=seeded(), output_type="pt")
    assert torch.equal(codes, expected.codes)
    assert torch.equal(images, expected.images)


@pytest.mark.parametrize("make", [make_pipeline, make_text_pipeline])
def test_saved_and_loaded(tmp_path, make):
    pipe = make()
    inputs = LABELS if make is make_pipeline else {"prompt": PROMPTS[:2], "output_type": "pt"}
    made = modular_of(pipe)
    made.update_components(guidance_scale=4.0, top_p=0.5)
    expected = draw(made, **inputs, generator=seeded())
    first, second = tmp_path / "first", tmp_path / "second"
    made.save_pretrained(str(first), overwrite_modular_index=True)
    index = json.loads((first / "modular_model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == type(made).__name__
    assert index["_blocks_class_name"] == type(made.blocks).__name__
    assert index["transformer"][:2] == ["hf_var", type(pipe.transformer).__name__]
    assert (index["guidance_scale"], index["top_p"]) == (4.0, 0.5)
    # A folder may be moved.
    first.rename(second)
    found = loaded(second)
    assert type(found) is type(made)
    assert torch.equal(draw(found, **inputs, generator=seeded())[0], expected[0])


@pytest.mark.parametrize(
    ("blocks", "workflow", "images"),
    [
        (VARAutoBlocks, "class2image", set()),
        (VARAutoBlocks, "image2image", {"image"}),
        (VARAutoBlocks, "inpainting", {"image", "mask_image"}),
        (VARTextAutoBlocks, "text2image", set()),
        (VARTextAutoBlocks, "image2image", {"image"}),
        (VARTextAutoBlocks, "inpainting", {"image", "mask_image"}),
    ],
)
def test_workflows(blocks, workflow, images):
    encoder = "class_encoder" if blocks is VARAutoBlocks else "text_encoder"
    found = blocks().get_workflow(workflow)
    assert list(found.sub_blocks) == ["settings", "image", encoder, "inputs", "denoise", "decode"]
    inputs = {entry.name for entry in found.inputs}
    assert inputs & {"image", "mask_image"} == images
    # What blocks hand on is not asked of the caller.
    handed_on = {"settings", "condition", "pixels", "mask", "num_given_scales", "latents"}
    assert not inputs & handed_on
    assert not {entry.name for entry in blocks().inputs} & handed_on


def test_a_workflow_alone(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path)
    found = loaded(tmp_path, workflow="image2image")
    inputs = {**LABELS, "image": IMAGE, "strength": 0.7}
    expected = draw(modular_of(pipe), **inputs, generator=seeded())[0]
    assert torch.equal(draw(found, **inputs, generator=seeded())[0], expected)


def test_blocks_one_by_one():
    """What a user interface does: a pipeline for each block, which hand on their results."""
    pipe = make_pipeline()
    whole = modular_of(pipe)
    expected = whole(**LABELS, generator=seeded())
    components = pipe.components
    state = modular_of(pipe, VARAutoBlocks().sub_blocks["settings"])(output_type="pt", generator=seeded())
    condition = modular_of(pipe, VARClassStep())
    condition = condition(class_labels=LABELS["class_labels"], output="condition")
    loop = modular_of(pipe, VARScaleLoop())
    latents = loop(settings=state.settings, condition=condition, output="latents")
    decode = VARDecodeStep().init_pipeline()
    decode.update_components(vqvae=components["vqvae"])
    assert torch.equal(latents, expected.latents)
    assert torch.equal(decode(latents=latents, output_type="pt", output="images"), expected.images)


def test_a_state_is_continued():
    pipe = modular_of(make_pipeline())
    state = pipe(**LABELS, generator=seeded(1))
    again = pipe(state=state, generator=seeded(1))
    assert torch.equal(again.images, state.images)
    assert len(pipe(state=state, class_labels=2).images) == 1
    # Also in another workflow.
    edited = pipe(state=state, image=IMAGE, mask_image=IMAGE[0])
    assert not torch.equal(edited.images, state.images)
    varied = pipe(state=edited, mask_image=None, strength=1.0, generator=seeded(1))
    again = pipe(state=varied, image=None, strength=None, generator=seeded(1))
    assert torch.equal(varied.images, state.images)
    assert torch.equal(again.images, state.images)


class ForbidCode(ModularPipelineBlocks):
    """A block in the loop, which sees the logits of a scale before codes are sampled."""

    @property
    def inputs(self):
        return [InputParam("forbidden", int, required=True)]

    def __call__(self, components, block_state, k):
        block_state.logits[..., block_state.forbidden] = -torch.inf
        return components, block_state


class NegativeStep(ModularPipelineBlocks):
    """A block behind ours."""

    @property
    def expected_components(self):
        return [ComponentSpec("transformer", VARTransformer)]

    @property
    def inputs(self):
        return [InputParam("images", required=True)]

    @property
    def intermediate_outputs(self):
        return [OutputParam("images")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.images = 1 - block_state.images
        self.set_block_state(state, block_state)
        return components, state


def test_blocks_of_others():
    pipe, blocks = make_pipeline(), VARAutoBlocks()
    images, codes = draw(modular_of(pipe), **LABELS, generator=seeded())
    blocks.sub_blocks.insert("negative", NegativeStep(), len(blocks.sub_blocks))
    assert torch.equal(draw(modular_of(pipe, blocks), **LABELS, generator=seeded())[0], 1 - images)
    code = int(codes.mode().values[0])
    blocks.sub_blocks["denoise"].sub_blocks.insert("forbid", ForbidCode(), 1)
    made = modular_of(pipe, blocks)
    assert (codes == code).any()
    assert not (draw(made, **LABELS, forbidden=code, generator=seeded())[1] == code).any()


def test_our_block_among_those_of_others():
    """A sequence of anyone's blocks, without the class of pipelines that ours have."""
    blocks = SequentialPipelineBlocks.from_blocks_dict({"decode": VARDecodeStep(), "negative": NegativeStep()})
    pipe = make_pipeline()
    made = modular_of(pipe, blocks)
    latents = torch.randn(1, 4, 4, 4, generator=seeded())
    decoded = pipe.image_processor.postprocess(pipe.vqvae.decode(latents=latents).sample.detach(), output_type="pt")
    assert torch.equal(made(latents=latents, output_type="pt", output="images"), 1 - decoded)


REFUSED = [
    {"top_p": 2.0},
    {"top_k": -1},
    {"temperature": [1.0]},
    {"guidance_scale": "much"},
    {"class_labels": 99},
    {"class_labels": "goldfisch"},
    {"class_labels": []},
    {"class_embeds": torch.zeros(1, 32), "class_labels": 1},
    {"num_images_per_label": 0},
    {"generator": [seeded()]},
    {"generator": 0},
    {"output_type": "jpg"},
    {"refiner_start": 1},
    {"refiner": make_transformer(hidden_size=64, num_labels=9), "refiner_start": 1},
    {"logits_processor": len},
]


@pytest.mark.parametrize("inputs", REFUSED, ids=lambda inputs: "-".join(inputs))
def test_bad_input_is_refused_as_by_the_pipeline(inputs):
    pipe, given = make_pipeline(), {"class_labels": [1, 2], **inputs}
    with pytest.raises(ValueError) as expected:
        pipe(**given)
    with pytest.raises(ValueError) as found:
        modular_of(pipe)(**given)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "inputs",
    [
        {"prompt": None},
        {"prompt": 3},
        {"prompt": []},
        {"prompt_embeds": torch.zeros(1, 3, 40)},
        {"negative_prompt": ["a", "b", "c"]},
        {"guidance_end": 9},
        {"smooth_start": -1},
        {"original_size": (0, 10)},
        {"num_images_per_prompt": 0},
    ],
    ids=str,
)
def test_bad_texts_are_refused_as_by_the_pipeline(inputs):
    pipe, given = make_text_pipeline(), {"prompt": PROMPTS[:2], **inputs}
    with pytest.raises(ValueError) as expected:
        pipe(**given)
    with pytest.raises(ValueError) as found:
        modular_of(pipe)(**given)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    "inputs",
    [
        {"image": torch.zeros(3, 3, 8, 8)},
        {"image": IMAGE + 1},
        {"image": []},
        {"mask_image": torch.ones(3, 8, 8)},
        {"mask_image": "left"},
        {"paste_original": True, "output_type": "latent"},
        {"paste_original": 1},
        {"feather_width": 2},
        {"paste_original": True, "feather_width": -1},
    ],
    ids=str,
)
def test_bad_images_are_refused_as_by_the_pipeline(inputs):
    pipe = make_pipeline()
    given = {"image": IMAGE, "mask_image": torch.ones(8, 8), "class_labels": [1, 2], **inputs}
    with pytest.raises(ValueError) as expected:
        VARInpaintPipeline.from_pipe(pipe)(**given)
    with pytest.raises(ValueError) as found:
        modular_of(pipe)(**given)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"strength": 0.0}, "`strength` = 0.0 needs `image`"),
        ({"num_kept_scales": 0}, "`num_kept_scales` = 0 needs `image`"),
        ({"paste_original": True}, "`paste_original` = True needs `mask_image`"),
        ({"image": IMAGE, "feather_width": 0}, "`feather_width` = 0 needs `mask_image`"),
        ({"image": IMAGE, "mask_image": IMAGE[0], "strength": 0.5}, "`strength` = 0.5 is for images without"),
        ({"mask_image": IMAGE[0]}, "'image' is missing"),
    ],
    ids=str,
)
def test_inputs_of_another_workflow_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        modular_of(make_pipeline())(class_labels=1, **inputs)


def test_models_are_checked(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    pipe = ModularPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`transformer` is not loaded: call `load_components\(\)`"):
        pipe(class_labels=1)
    pipe.load_components()
    pipe.update_components(vqvae=make_vqvae(codebook_size=16))
    with pytest.raises(ValueError, match="`transformer` and `vqvae` do not belong together: codebook_size"):
        pipe(class_labels=1)
    pipe = modular_of(make_text_pipeline())
    pipe.update_components(text_encoder_2=None)
    with pytest.raises(ValueError, match="`text_encoder` must have hidden states of 40 channels"):
        pipe(prompt="a cat")


@pytest.mark.parametrize("blocks", [VARAutoBlocks(), VARTextAutoBlocks(), VARTextEncoderStep(), VARScaleLoop()])
def test_blocks_describe_themselves(blocks):
    assert "TODO" not in blocks.doc
    assert blocks.description in blocks.doc
    assert type(blocks).__doc__ not in (None, type(blocks).__base__.__doc__)
    node = MellonPipelineConfig.from_custom_block(blocks).node_params["custom"]
    assert set(node["input_names"]) == set(blocks.input_names)
