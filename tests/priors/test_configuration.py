# SPDX-License-Identifier: Apache-2.0
"""The configuration: defaults, derived values, labels, and what a JSON file keeps."""

import math
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from hf_var import VARConfig
from priors.tiny import tiny_config


def reloaded(config, folder, **overrides):
    config.save_pretrained(folder)
    return VARConfig.from_pretrained(folder, **overrides)


def test_defaults_are_those_of_d16_and_silent():
    with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as log:
        warnings.simplefilter("error")
        config = VARConfig()
    assert log.out == ""
    assert config.num_labels == 1000
    assert config.length == 680
    assert config.head_dim == 64
    assert config.block_lengths == [1, 4, 9, 16, 25, 36, 64, 100, 169, 256]
    assert config.block_ends == [1, 5, 14, 30, 55, 91, 155, 255, 424, 680]
    assert config.drop_path_rates[0] == 0
    assert config.drop_path_rates[-1] == pytest.approx(0.1 * 16 / 24)
    assert config.initial_std == pytest.approx(math.sqrt(1 / 3072))


def test_drop_path_grows_linearly():
    assert tiny_config(num_hidden_layers=3, drop_path_rate=0.5).drop_path_rates == pytest.approx([0, 0.25, 0.5])
    assert tiny_config(num_hidden_layers=1, drop_path_rate=0.5).drop_path_rates == [0]


def test_sizes_that_are_not_square():
    config = tiny_config()
    assert config.patch_nums == [1, 2, [2, 3]]
    assert config.scale_sizes == [(1, 1), (2, 2), (2, 3)]
    assert config.scale_lengths == [1, 4, 6]
    assert tiny_config(patch_nums=[[1, 1], (2, 2), (2, 3)]).patch_nums == config.patch_nums


@pytest.mark.parametrize(
    "config",
    [
        VARConfig(),
        tiny_config(),
        tiny_config(num_labels=0),
        tiny_config(num_labels=1),
        # transformers takes two labels for its own default, and does not write it down.
        tiny_config(num_labels=2),
        tiny_config(block_sizes=(2, 2, 1, 4, 2), qk_norm=False, shared_adaln=True, initializer_range=0.5),
        VARConfig(id2label={0: "cat", 1: "dog"}),
        VARConfig(id2label={1: "one", 0: "zero", 2: "one"}),
    ],
    ids=["defaults", "tiny", "no_labels", "one_label", "two_labels", "all_else", "names", "shared_name"],
)
def test_a_file_gives_the_configuration_back(config, tmp_path):
    loaded = reloaded(config, tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.num_labels == config.num_labels
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is VARConfig
    assert VARConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    # Once more, from what was loaded.
    assert reloaded(loaded, tmp_path).to_dict() == config.to_dict()


def test_names_of_labels_have_integers_as_ids(tmp_path):
    config = VARConfig(id2label={"0": "cat", "1": "dog", "2": "emu"})
    for each in (config, reloaded(config, tmp_path)):
        assert each.id2label == {0: "cat", 1: "dog", 2: "emu"}
        assert each.label2id == {"cat": 0, "dog": 1, "emu": 2}
        assert each.num_labels == 3


def test_new_names_replace_the_old_ones_in_both_directions(tmp_path):
    config = VARConfig(id2label={0: "cat", 1: "dog"})
    renamed = reloaded(config, tmp_path, id2label={"0": "Katze", "1": "Hund"})
    assert renamed.id2label == {0: "Katze", 1: "Hund"}
    assert renamed.label2id == {"Katze": 0, "Hund": 1}
    # A file whose names were edited by hand in one place only.
    edited = VARConfig.from_dict(config.to_dict() | {"id2label": {"0": "Katze", "1": "Hund"}})
    assert edited.label2id == {"Katze": 0, "Hund": 1}
    more = reloaded(config, tmp_path, id2label={0: "cat", 1: "dog", 2: "emu"})
    assert more.num_labels == 3
    assert more.label2id == {"cat": 0, "dog": 1, "emu": 2}


def test_num_labels_that_contradicts_the_names_raises(tmp_path):
    message = r"`num_labels` is 3 but `id2label` names 2 labels. Pass an `id2label` of the new length"
    with pytest.raises(ValueError, match=message):
        VARConfig(id2label={0: "cat", 1: "dog"}, num_labels=3)
    config = VARConfig(id2label={0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match=message):
        reloaded(config, tmp_path, num_labels=3)
    assert reloaded(config, tmp_path, num_labels=2).num_labels == 2
    names = {0: "cat", 1: "dog", 2: "emu"}
    assert reloaded(config, tmp_path, num_labels=3, id2label=names).id2label == names


def test_overrides_at_loading_are_checked_like_any_value(tmp_path):
    config = tiny_config()
    assert reloaded(config, tmp_path, hidden_size=64).head_dim == 32
    with pytest.raises(ValueError, match="`hidden_size` must be a multiple of `num_attention_heads`, got 33 and 2"):
        reloaded(config, tmp_path, hidden_size=33)
    with pytest.raises(ValueError, match="`block_sizes` must add up to the 11 tokens"):
        reloaded(config, tmp_path, block_sizes=[1, 4])
    loaded, unused = reloaded(config, tmp_path, hidden_size=64, something_else=1, return_unused_kwargs=True)
    assert loaded.hidden_size == 64
    assert unused == {"something_else": 1}


def test_unknown_fields_are_kept(tmp_path):
    config = tiny_config(trained_on="digits")
    assert reloaded(config, tmp_path).trained_on == "digits"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_labels": -1}, "`num_labels` must be at least 0, got -1"),
        ({"num_labels": 2.5}, "`num_labels` must be an integer, at least 0, got 2.5"),
        ({"num_labels": None, "id2label": {0: "a", 2: "b"}}, r"`id2label` must name the ids 0 to 1, got \[0, 2\]"),
        ({"num_labels": None, "id2label": {"cat": 0}}, r"`id2label` must name the ids 0 to 0, got \['cat'\]"),
        ({"num_labels": None, "id2label": {0: "a", "0": "b"}}, r"`id2label` must name the ids 0 to 1, got \[0, 0\]"),
        ({"codebook_size": 0}, "`codebook_size` must be at least 1, got 0"),
        ({"latent_channels": -4}, "`latent_channels` must be at least 1, got -4"),
        ({"hidden_size": "32"}, "`hidden_size` must be an integer, at least 1, got '32'"),
        ({"hidden_size": 33}, "`hidden_size` must be a multiple of `num_attention_heads`, got 33 and 2"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"num_hidden_layers": 1.5}, "`num_hidden_layers` must be an integer, at least 1, got 1.5"),
        ({"num_labels": 10**30}, "`num_labels` must be from 0 to 1048576, got 1000"),
        ({"length": 21}, "`length` follows from other fields of VARConfig, leave it out"),
        ({"num_labels": True}, "`num_labels` must be an integer, at least 0, got True"),
        ({"num_labels": 1.0, "id2label": {0: "a"}}, "`num_labels` must be an integer, at least 0, got 1.0"),
        ({"num_labels": None, "id2label": []}, r"`id2label` must be a dictionary, got \[\]"),
        ({"num_labels": None, "id2label": {0: 7}}, r"`id2label` must name each label by a text, got \{0: 7\}"),
        ({"label2id": "cat"}, "`label2id` must be a dictionary, got 'cat'"),
        ({"hidden_size": True}, "`hidden_size` must be an integer, at least 1, got True"),
        ({"hidden_size": 32.0}, "`hidden_size` must be an integer, at least 1, got 32.0"),
        ({"condition_channels": 0}, "`condition_channels` must be at least 1, got 0"),
        ({"mlp_ratio": 0}, "`mlp_ratio` must be positive, got 0"),
        ({"mlp_ratio": "4"}, "`mlp_ratio` must be a number, positive, got '4'"),
        ({"mlp_ratio": math.nan}, "`mlp_ratio` must be a number, positive, got nan"),
        ({"mlp_ratio": math.inf}, "`mlp_ratio` must be a number, positive, got inf"),
        ({"mlp_ratio": 1e-9}, "`mlp_ratio` times `hidden_size` must be at least 1, got 1e-09"),
        ({"qk_norm": "no"}, "`qk_norm` must be true or false, got 'no'"),
        ({"shared_adaln": 1}, "`shared_adaln` must be true or false, got 1"),
        ({"use_cache": None}, "`use_cache` must be true or false, got None"),
        ({"layer_norm_eps": 0}, "`layer_norm_eps` must be positive, got 0"),
        ({"layer_norm_eps": "1e-6"}, "`layer_norm_eps` must be a number, positive, got '1e-6'"),
        ({"initializer_range": -0.02}, "`initializer_range` must be positive, got -0.02"),
        ({"initializer_range": math.nan}, "`initializer_range` must be a number, positive, got nan"),
        ({"initializer_head_factor": "1"}, "`initializer_head_factor` must be a number, at least 0, got '1'"),
        ({"initializer_adaln_factor": -1}, "`initializer_adaln_factor` must be at least 0, got -1"),
        ({"initializer_adaln_gamma_factor": math.inf}, "`initializer_adaln_gamma_factor` must be .* got inf"),
        ({"dropout": math.nan}, "`dropout` must be a number, at least 0 and below 1, got nan"),
        ({"dropout": True}, "`dropout` must be a number, at least 0 and below 1, got True"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1, got 1.0"),
        ({"attention_dropout": -0.1}, "`attention_dropout` must be at least 0 and below 1, got -0.1"),
        ({"drop_path_rate": 2}, "`drop_path_rate` must be at least 0 and below 1, got 2"),
        ({"class_dropout_prob": "0.1"}, "`class_dropout_prob` must be a number, at least 0 and below 1, got '0.1'"),
        ({"label_smoothing": 1}, "`label_smoothing` must be at least 0 and below 1, got 1"),
        ({"patch_nums": ()}, r"`patch_nums` must be a list with the size of every scale.*got \(\)"),
        ({"patch_nums": 16}, "`patch_nums` must be a list with the size of every scale.*got 16"),
        ({"patch_nums": "1,2"}, "`patch_nums` must be a list with the size of every scale.*got '1,2'"),
        ({"patch_nums": (1, 0)}, r"`patch_nums` must hold positive integers or .* got the entry 0 in \[1, 0\]"),
        ({"patch_nums": (1, (2, 3, 4))}, r"`patch_nums` must hold .* pairs of them, got the entry \(2, 3, 4\)"),
        ({"patch_nums": (1, 2.0)}, r"`patch_nums` must hold .* got the entry 2.0"),
        ({"patch_nums": (1, "2")}, r"`patch_nums` must hold .* got the entry '2'"),
        ({"patch_nums": b"12"}, "`patch_nums` must be a list with the size of every scale.*got b'12'"),
        ({"patch_nums": (1, (2, True))}, r"`patch_nums` must hold .* got the entry \(2, True\)"),
        ({"block_sizes": 5}, "`block_sizes` must be a list, got 5"),
        ({"block_sizes": "11"}, "`block_sizes` must be a list, got '11'"),
        ({"block_sizes": [1, 4.0, 6]}, r"`block_sizes\[1\]` must be an integer, at least 1, got 4.0"),
        ({"patch_nums": (1, 4, 2)}, r"`patch_nums` must end with its largest map.*got \[1, 4, 2\]"),
        ({"patch_nums": (1, (4, 1), (2, 3))}, r"`patch_nums` must end with its largest map"),
        ({"block_sizes": [1, 4]}, r"`block_sizes` must add up to the 11 tokens of .* got 5 tokens in 2 blocks"),
        ({"block_sizes": []}, r"`block_sizes` must add up to the 11 tokens of .* got 0 tokens in 0 blocks"),
        ({"block_sizes": [1, 0, 10]}, r"`block_sizes\[1\]` must be at least 1, got 0"),
    ],
)
def test_impossible_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**overrides)


def test_numbers_of_numpy_become_those_that_json_stores(tmp_path):
    sizes = {
        "hidden_size": np.int64(32),
        "mlp_ratio": np.float32(2),
        "dropout": np.float64(0.5),
        "num_labels": np.uint8(5),
    }
    config = tiny_config(patch_nums=(np.int64(1), 2, (np.int16(2), 3)), block_sizes=np.ones(11, int).tolist(), **sizes)
    plain = tiny_config(hidden_size=32, mlp_ratio=2.0, dropout=0.5, num_labels=5, block_sizes=[1] * 11)
    assert config.to_json_string() == plain.to_json_string()
    assert reloaded(config, tmp_path).to_dict() == plain.to_dict()
    assert VARConfig(block_sizes=(np.int64(680),)).block_sizes == [680]


def test_fields_of_transformers_are_taken():
    config = tiny_config(dtype="bfloat16", output_hidden_states=True, architectures=["VARTransformer"])
    assert config.dtype == torch.bfloat16
    assert config.output_hidden_states is True
    assert config.architectures == ["VARTransformer"]
