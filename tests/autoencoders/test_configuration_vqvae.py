# SPDX-License-Identifier: Apache-2.0
import json
import warnings

import numpy as np
import pytest

from hf_var import VQVAEConfig
from hf_var.ranges import PositiveInt


def test_defaults_are_the_released_tokenizer():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = VQVAEConfig()
    assert config.image_size == (256, 256)
    assert config.latent_size == (16, 16)
    assert sum(config.scale_lengths) == 680


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"patch_nums": (1, 2, 4), "channel_multipliers": (1, 2)},
        {"patch_nums": ((1, 1), (1, 2), (4, 6)), "out_channels": 1, "dropout": 0.25},
        {"patch_nums": [3], "num_refinement_convs": 0, "refinement_ratio": 0},
        {"quantizer": "fsq", "fsq_levels": (8, 5, 5, 5)},
        {"quantizer": "fsq", "fsq_levels": [3, 4], "codebook_size": 12, "latent_channels": 2},
        {"attention_levels": (3, 1), "encoder_out_channels": 48},
        {"attention_levels": (), "mid_block_attention": False},
        {"in_channels": 7, "sample_type": "class_map", "out_channels": 7},
    ],
    ids=str,
)
def test_json_round_trip(tmp_path, fields):
    config = VQVAEConfig(**fields)
    config.save_pretrained(tmp_path)
    loaded = VQVAEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    loaded.save_pretrained(tmp_path)
    assert VQVAEConfig.from_pretrained(tmp_path) == loaded
    assert loaded.patch_nums == config.patch_nums
    assert VQVAEConfig(**json.loads(config.to_json_string())).to_dict() == config.to_dict()
    assert "image_size" not in config.to_dict()  # derived values are not stored


def test_pairs_and_integers_are_the_same_sizes():
    config = VQVAEConfig(patch_nums=(1, (2, 3), (4, 4)))
    assert config.patch_nums == [1, [2, 3], 4]
    assert config.scale_sizes == [(1, 1), (2, 3), (4, 4)]
    assert config.scale_lengths == [1, 6, 16]
    assert VQVAEConfig(patch_nums=[1, [2, 3], 4]).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "levels", "is_last"),
    [
        ({}, [2], True),
        ({"last_level_attention": False}, [], False),
        ({"attention_levels": (1,)}, [1], False),
        ({"attention_levels": (2, 0)}, [0, 2], True),
        ({"attention_levels": (1,), "last_level_attention": False}, [1], False),
        ({"attention_levels": (2,), "last_level_attention": True}, [2], True),
        ({"attention_levels": []}, [], False),
    ],
    ids=str,
)
def test_levels_with_attention(fields, levels, is_last):
    config = VQVAEConfig(channel_multipliers=(1, 1, 2), **fields)
    assert config.levels_with_attention == levels
    assert config.last_level_attention is is_last


def test_channels_and_classes_that_follow():
    config = VQVAEConfig(in_channels=1, latent_channels=8)
    assert (config.num_encoder_channels, config.num_pixel_classes) == (8, None)
    config = VQVAEConfig(in_channels=9, latent_channels=8, encoder_out_channels=24, sample_type="class_map")
    assert (config.num_encoder_channels, config.num_pixel_classes, config.num_output_channels) == (24, 9, 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_channels": 0}, "`in_channels`.*got 0"),
        ({"attention_levels": 4}, "`attention_levels` must be a list, got 4"),
        ({"attention_levels": (5,)}, r"`attention_levels` must be different levels from 0 to 4, got \[5\]"),
        ({"attention_levels": (2, 2)}, r"`attention_levels` must be different levels from 0 to 4, got \[2, 2\]"),
        ({"attention_levels": (-1,)}, r"`attention_levels\[0\]` must be at least 0, got -1"),
        (
            {"attention_levels": (1,), "last_level_attention": True},
            r"`last_level_attention` must be False with attention_levels=\[1\] of 5 levels, got True. Leave it out",
        ),
        (
            {"attention_levels": (4,), "last_level_attention": False},
            r"`last_level_attention` must be True with attention_levels=\[4\] of 5 levels, got False",
        ),
        ({"encoder_out_channels": 0}, "`encoder_out_channels` must be at least 1, got 0"),
        ({"sample_type": "map"}, "`sample_type` must be one of image, class_map, got 'map'"),
        (
            {"sample_type": "class_map", "in_channels": 1},
            "`in_channels` must be the number of classes with sample_type='class_map', 2 or more,.*got 1 and 1",
        ),
        (
            {"sample_type": "class_map", "in_channels": 5, "out_channels": 3},
            "`out_channels` the same, got 5 and 3",
        ),
        ({"out_channels": -1}, "`out_channels`.*got -1"),
        ({"base_channels": "160"}, "`base_channels`.*got '160'"),
        ({"base_channels": 100}, r"`base_channels` times `channel_multipliers\[0\]`.*`norm_num_groups` = 32"),
        ({"norm_num_groups": 3}, "`norm_num_groups` = 3"),
        ({"num_res_blocks": 1.5}, "`num_res_blocks`.*got 1.5"),
        ({"latent_channels": True}, "`latent_channels`.*got True"),
        ({"codebook_size": 0}, "`codebook_size`.*got 0"),
        ({"quant_conv_kernel_size": 2}, "`quant_conv_kernel_size` must be odd, got 2"),
        ({"dropout": 1.0}, "`dropout`.*got 1.0"),
        ({"channel_multipliers": 2}, "`channel_multipliers`.*got 2"),
        ({"channel_multipliers": ()}, r"`channel_multipliers`.*got \[\]"),
        ({"channel_multipliers": (1, 2.0)}, r"`channel_multipliers\[1\]` must be an integer, at least 1, got 2.0"),
        ({"channel_multipliers": "12"}, "`channel_multipliers` must be a list, got '12'"),
        ({"last_level_attention": "no"}, "`last_level_attention` must be true or false, got 'no'"),
        ({"mid_block_attention": 0}, "`mid_block_attention` must be true or false, got 0"),
        ({"normalize_codebook": "false"}, "`normalize_codebook` must be true or false, got 'false'"),
        ({"dropout": float("nan")}, "`dropout` must be a number, at least 0 and below 1, got nan"),
        ({"commitment_loss_weight": float("inf")}, "`commitment_loss_weight` must be .* got inf"),
        ({"quantizer": None}, "`quantizer` must be one of vq, fsq, got None"),
        ({"id2label": []}, r"`id2label` must be a dictionary, got \[\]"),
        ({"channel_multipliers": (1, 0)}, r"`channel_multipliers\[1\]`.*got 0"),
        ({"num_refinement_convs": -1}, "`num_refinement_convs`.*got -1"),
        ({"num_refinement_convs": True}, "`num_refinement_convs`.*got True"),
        ({"refinement_ratio": 1.5}, "`refinement_ratio`.*got 1.5"),
        ({"refinement_ratio": -0.5}, "`refinement_ratio`.*got -0.5"),
        ({"refinement_ratio": "half"}, "`refinement_ratio`.*got 'half'"),
        ({"commitment_loss_weight": -0.25}, "`commitment_loss_weight`.*got -0.25"),
        ({"codebook_loss_weight": float("nan")}, "`codebook_loss_weight`.*got nan"),
        ({"quantizer": "lfq"}, "`quantizer` must be one of vq, fsq, got 'lfq'"),
        ({"fsq_levels": (8, 5)}, r"`fsq_levels` goes with quantizer='fsq', got \[8, 5\]"),
        ({"quantizer": "fsq"}, "`fsq_levels` must be a list.*got None"),
        ({"quantizer": "fsq", "fsq_levels": ()}, r"`fsq_levels` must be a list.*got \[\]"),
        ({"quantizer": "fsq", "fsq_levels": 8}, "`fsq_levels` must be a list.*got 8"),
        ({"quantizer": "fsq", "fsq_levels": (8, 1)}, r"`fsq_levels\[1\]` must be at least 2, got 1"),
        ({"quantizer": "fsq", "fsq_levels": (8, 5.0)}, r"`fsq_levels\[1\]`.*got 5.0"),
        ({"quantizer": "fsq", "fsq_levels": (True, 5)}, r"`fsq_levels\[0\]`.*got True"),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_size": 41},
            "`codebook_size` must be the product.*40, got 41",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "latent_channels": 32},
            "`latent_channels` must be the number.*2, got 32",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "normalize_codebook": True},
            "`normalize_codebook` goes with.*'vq'",
        ),
        (
            {"quantizer": "fsq", "fsq_levels": (8, 5), "codebook_averages": True},
            "`codebook_averages` goes with.*'vq'",
        ),
        ({"patch_nums": 16}, "`patch_nums`.*got 16"),
        ({"patch_nums": "1,2,4"}, "`patch_nums`.*got '1,2,4'"),
        ({"patch_nums": ()}, r"`patch_nums`.*got \(\)"),
        ({"patch_nums": (1, 0, 4)}, "`patch_nums`.*entry 0"),
        ({"patch_nums": (1, 2.0, 4)}, "`patch_nums`.*entry 2.0"),
        ({"patch_nums": (True, 4)}, "`patch_nums`.*entry True"),
        ({"patch_nums": (1, (2, 3, 4))}, r"`patch_nums`.*entry \(2, 3, 4\)"),
        ({"patch_nums": (4, 2)}, r"`patch_nums` must end with its largest map.*\[4, 2\]"),
        ({"patch_nums": ((1, 5), (4, 4))}, "`patch_nums` must end with its largest map"),
    ],
    ids=str,
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**fields)


def test_overrides_at_loading_are_checked_like_any_value(tmp_path):
    VQVAEConfig(base_channels=32).save_pretrained(tmp_path)
    loaded = VQVAEConfig.from_pretrained(tmp_path, patch_nums=(2, (4, 4)), dropout=0.5)
    assert loaded.patch_nums == [2, 4]
    assert loaded.dropout == 0.5
    with pytest.raises(ValueError, match="patch_nums"):
        VQVAEConfig.from_pretrained(tmp_path, patch_nums=(4, 2))


def test_numbers_of_numpy_become_those_that_json_stores(tmp_path):
    fields = {"base_channels": np.int64(32), "channel_multipliers": (np.int8(1), 2), "dropout": np.float32(0.5)}
    config = VQVAEConfig(
        patch_nums=(np.int64(1), (np.int32(2), 3)), quantizer="fsq", fsq_levels=[np.int64(3)], **fields
    )
    plain = VQVAEConfig(
        base_channels=32,
        channel_multipliers=(1, 2),
        dropout=0.5,
        patch_nums=(1, (2, 3)),
        quantizer="fsq",
        fsq_levels=[3],
    )
    assert config.to_json_string() == plain.to_json_string()
    config.save_pretrained(tmp_path)
    assert VQVAEConfig.from_pretrained(tmp_path).to_dict() == plain.to_dict()


def test_subclasses_are_checked_like_their_base():
    class Wider(VQVAEConfig):
        extra: PositiveInt = 1

    assert Wider(extra=np.int64(2)).to_dict()["extra"] == 2
    with pytest.raises(ValueError, match="`extra` must be at least 1, got 0"):
        Wider(extra=0)
    with pytest.raises(ValueError, match="`base_channels` must be an integer, at least 1, got '160'"):
        Wider(base_channels="160")
