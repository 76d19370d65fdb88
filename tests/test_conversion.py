# SPDX-License-Identifier: Apache-2.0
"""Official checkpoints to our models and back, without losing a bit or a setting."""

import random

import pytest
import torch

from hf_var import VARConfig, VARTransformer, VQVAEConfig, VQVAEModel
from hf_var.conversion import (
    export_official_var,
    export_official_vqvae,
    imagenet_id2label,
    load_official_var,
    load_official_vqvae,
)
from hf_var.conversion.official_var import RELEASED_PATCH_NUMS
from parity import CASES, assert_same_tensors, load_case, make_contrast, official_gradients


# --- the golden cases ------------------------------------------------------------------------------------------------


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


@pytest.mark.parity
def test_official_to_ours_to_official(case):
    vqvae = load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums)
    assert_same_tensors(export_official_vqvae(vqvae), case.vqvae_weights)
    var = load_official_var(case.var_weights, **case.var_overrides)
    assert_same_tensors(export_official_var(var), case.var_weights)


@pytest.mark.parity
def test_inferred_configurations(case):
    arguments = case.manifest["vae_args"]
    config = load_official_vqvae(case.vqvae_weights, patch_nums=case.patch_nums).config
    assert config.codebook_size == arguments["vocab_size"]
    assert config.latent_channels == arguments["z_channels"]
    assert config.base_channels == arguments["ch"]
    assert config.channel_multipliers == [1, 1, 2, 2, 4]
    assert config.num_res_blocks == 2
    assert config.num_refinement_convs == arguments["share_quant_resi"]
    assert config.last_level_attention
    assert config.mid_block_attention

    arguments = case.manifest["var_args"]
    config = load_official_var(case.var_weights, **case.var_overrides).config
    assert config.num_labels == arguments["num_classes"]
    assert config.num_hidden_layers == arguments["depth"]
    assert config.hidden_size == arguments["embed_dim"]
    assert config.num_attention_heads == arguments["num_heads"]
    assert config.mlp_ratio == arguments["mlp_ratio"]
    assert config.qk_norm == arguments["attn_l2_norm"]
    assert config.shared_adaln == arguments["shared_aln"]
    assert config.patch_nums == arguments["patch_nums"]


@pytest.mark.parity
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_transformer_training_pass(case, label_smoothing):
    model = load_official_var(
        case.var_weights,
        class_dropout_prob=0.0,
        drop_path_rate=0.0,
        label_smoothing=label_smoothing,
        **case.var_overrides,
    ).train()
    codes = case.expected["tok/idx"].long()
    output = model(case.inputs["labels"], case.expected["var/teacher_input"], labels=codes)
    case.assert_close("var/logits", output.logits)
    section = f"var_train/ls{label_smoothing:g}"
    assert output.loss.item() == pytest.approx(case.scalars[f"{section}/loss"], abs=5e-6)
    output.loss.backward()
    case.assert_gradients_close(f"{section}/", official_gradients(model, export_official_var))


# --- any model -------------------------------------------------------------------------------------------------------


def random_vqvae_fields(seed):
    choose = random.Random(seed)
    patch_nums = choose.choice([(4,), (1, 2), (3, 3, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), ((1, 1), (2, 3), (3, 4))])
    levels = choose.randint(1, 4)
    return {
        "in_channels": choose.choice([1, 3, 4]),
        "out_channels": choose.choice([None, 2]),
        "base_channels": 32,
        "channel_multipliers": [choose.choice([1, 2]) for _ in range(levels)],
        "num_res_blocks": choose.randint(1, 3),
        "last_level_attention": choose.random() < 0.7,
        "mid_block_attention": choose.random() < 0.7,
        "latent_channels": choose.choice([4, 8]),
        "quant_conv_kernel_size": choose.choice([1, 3]),
        "codebook_size": choose.choice([16, 31]),
        "patch_nums": patch_nums,
        "num_refinement_convs": choose.choice([0, 1, 2, 4, len(patch_nums)]),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("seed", "fixed"),
    [
        *((seed, {}) for seed in range(8)),
        *((seed, {"num_refinement_convs": share}) for seed, share in enumerate([0, 1, 2, 4], start=20)),
        (30, {"refinement_ratio": 0.0}),
        (31, {"normalize_codebook": True, "refinement_ratio": 0.25, "commitment_loss_weight": 0.5}),
    ],
    ids=str,
)
def test_vqvae_round_trip(seed, fixed):
    model = make_contrast(VQVAEModel(VQVAEConfig(**{**random_vqvae_fields(seed), **fixed})))
    config = model.config
    official = export_official_vqvae(model)
    names = [name for name in official if "quant_resi" in name and name.endswith("weight")]
    if config.refinement_ratio == 0:
        expected = []
    elif config.num_refinement_convs == 1:
        expected = ["quantize.quant_resi.qresi.weight"]
    elif config.num_refinement_convs == 0:
        expected = [f"quantize.quant_resi.{index}.weight" for index in range(len(config.patch_nums))]
    else:
        expected = [f"quantize.quant_resi.qresi_ls.{index}.weight" for index in range(config.num_refinement_convs)]
    assert names == expected

    # What no tensor tells.
    overrides = {name: value for name, value in fixed.items() if name != "num_refinement_convs"}
    loaded = load_official_vqvae(official, patch_nums=config.patch_nums, **overrides)
    assert_same_tensors(export_official_vqvae(loaded), official)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    unused = {} if config.refinement_ratio else {"num_refinement_convs": config.num_refinement_convs}
    assert {**loaded.config.to_dict(), **unused} == config.to_dict()
    images = torch.rand(1, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded(images).sample, model(images).sample)


def random_var_fields(seed):
    choose = random.Random(seed)
    heads = choose.choice([1, 2, 3])
    return {
        "num_labels": choose.choice([0, 1, 5]),
        "codebook_size": choose.choice([16, 31]),
        "latent_channels": choose.choice([4, 8]),
        "patch_nums": choose.choice([(4,), (1, 2), (2, 2, 3), (1, 2, 3, 4), (1, 3, 5)]),
        "hidden_size": heads * choose.choice([8, 16]),
        "num_hidden_layers": choose.randint(1, 3),
        "num_attention_heads": heads,
        "mlp_ratio": choose.choice([1.0, 2.5, 4.0]),
        "qk_norm": choose.random() < 0.5,
        "shared_adaln": choose.random() < 0.5,
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("seed", "fixed"),
    [
        *((seed, {}) for seed in range(8)),
        *(
            (seed, {"qk_norm": seed % 2 == 0, "shared_adaln": seed < 22, "mlp_ratio": 1.1, "hidden_size": 24})
            for seed in range(20, 24)
        ),
        (30, {"patch_nums": [[1, 2], [3, 4]]}),
    ],
    ids=str,
)
def test_var_round_trip(seed, fixed):
    model = make_contrast(VARTransformer(VARConfig(**{**random_var_fields(seed), **fixed})))
    config = model.config
    official = export_official_var(model)
    overrides = {} if config.qk_norm else {"num_attention_heads": config.num_attention_heads}
    if "patch_nums" in fixed:
        overrides["patch_nums"] = fixed["patch_nums"]
    loaded = load_official_var(official, **overrides)
    assert_same_tensors(export_official_var(loaded), official)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    changed = {"mlp_ratio"} if config.mlp_ratio == 1.1 else set()  # known to the nearest width
    assert {name for name, value in loaded.config.to_dict().items() if value != config.to_dict()[name]} == changed
    inputs = torch.randn(2, config.length, config.latent_channels, generator=torch.Generator().manual_seed(1))
    inputs = inputs[:, config.scale_lengths[0] :] if len(config.patch_nums) > 1 else None
    labels = torch.tensor([config.num_labels, 0])
    assert torch.equal(loaded(labels, inputs).logits, model(labels, inputs).logits)


def test_blocks_that_are_no_scales_cannot_be_exported():
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_nums": (1, 2)}
    with pytest.raises(ValueError, match=r"`block_sizes` must be one block per scale.*\[1, 1, 1, 1, 1\]"):
        export_official_var(VARTransformer(VARConfig(block_sizes=[1] * 5, **fields)))


def test_a_projection_of_embeddings_cannot_be_exported():
    fields = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_nums": (1, 2)}
    with pytest.raises(ValueError, match="`condition_channels` must be None for the official code"):
        export_official_var(VARTransformer(VARConfig(condition_channels=3, **fields)))


# --- the released models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"hidden_size": 1024, "num_hidden_layers": 16}, 310_283_520),
        ({"hidden_size": 1920, "num_hidden_layers": 30}, 2_010_020_356),
        ({"hidden_size": 2304, "num_hidden_layers": 36, "shared_adaln": True}, 2_353_893_904),
    ],
    ids=["d16", "d30", "d36"],
)
def test_released_transformers(fields, count):
    heads = fields["num_hidden_layers"]
    patch_nums = RELEASED_PATCH_NUMS[512 if heads == 36 else 256]
    with torch.device("meta"):
        model = VARTransformer(VARConfig(num_attention_heads=heads, patch_nums=patch_nums, **fields))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    # Without the level buffer: the length alone tells the token maps.
    official = export_official_var(model)
    del official["lvl_1L"]
    config = load_official_var(official).config
    assert config.patch_nums == list(patch_nums)
    assert config.num_attention_heads == heads
    assert config.shared_adaln == (heads == 36)
    assert config.id2label == imagenet_id2label()


def test_released_tokenizer():
    with torch.device("meta"):
        model = VQVAEModel(VQVAEConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 108_948_355
    assert load_official_vqvae(export_official_vqvae(model)).config.to_dict() == VQVAEConfig().to_dict()


@pytest.fixture(scope="module")
def small_var():
    """An official state dict of five tokens and ten labels."""
    fields = {"num_labels": 10, "latent_channels": 4, "codebook_size": 16, "patch_nums": (1, 2)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return export_official_var(make_contrast(VARTransformer(VARConfig(**fields, **sizes))))


@pytest.mark.parametrize(("resolution", "length"), [(256, 680), (512, 2240), (1024, 9451)])
def test_released_schedules_from_their_lengths(small_var, resolution, length):
    patch_nums = RELEASED_PATCH_NUMS[resolution]
    weights = {name: tensor for name, tensor in small_var.items() if name not in ("lvl_1L", "attn_bias_for_masking")}
    weights["pos_1LC"] = torch.zeros(1, length, 16)
    weights["lvl_embed.weight"] = torch.zeros(len(patch_nums), 16)
    assert load_official_var(weights).config.patch_nums == list(patch_nums)


def test_imagenet_names(small_var):
    model = load_official_var({**small_var, "class_emb.weight": torch.zeros(1001, 16)})
    assert model.config.num_labels == 1000
    assert model.config.id2label[0].startswith("tench")
    assert model.config.id2label[207].startswith("golden retriever")
    assert model.config.id2label[980].startswith("volcano")
    assert model.config.label2id[model.config.id2label[999]] == 999
    other = {label: f"class {label}" for label in range(1000)}
    model = load_official_var({**small_var, "class_emb.weight": torch.zeros(1001, 16)}, id2label=other)
    assert model.config.id2label == other
    assert load_official_var(small_var).config.num_labels == 10
    assert load_official_var(small_var).config.id2label[3] == "LABEL_3"
