# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed is compared with its beginning, to any depth."""

import pytest

from hf_var.data.resumable_settings import check_settings, first_difference, read_settings, write_settings


BEGUN = {"seed": 0, "config": {"depth": 2, "dropout": 0.0, "patch_nums": [1, 2]}, "id2label": {"0": "cat"}}


def test_equal_settings_have_no_difference(tmp_path):
    # As JSON gives them back.
    now = {"seed": 0, "config": {"depth": 2, "dropout": 0.0, "patch_nums": (1, 2)}, "id2label": {0: "cat"}}
    write_settings(tmp_path / "settings.json", now)
    assert first_difference(read_settings(tmp_path / "settings.json"), now) is None
    assert first_difference(BEGUN, now) is None
    check_settings(tmp_path, {}, now)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"seed": 1}, ("seed", 0, 1)),
        ({"seed": None}, ("seed", 0, None)),
        ({"new": 3}, ("new", None, 3)),
        ({"config": {**BEGUN["config"], "depth": 3}}, ("config.depth", 2, 3)),
        ({"config": {**BEGUN["config"], "heads": 4}}, ("config.heads", None, 4)),
        ({"config": None}, ("config", BEGUN["config"], None)),
        ({"id2label": {0: "dog"}}, ("id2label.0", "cat", "dog")),
    ],
)
def test_the_first_difference_is_named(changed, expected):
    now = BEGUN | changed
    assert first_difference(BEGUN, now) == expected
    name, before, after = expected
    with pytest.raises(ValueError, match=f"`{name}` was .* when the files in 'runs' were begun, got "):
        check_settings("runs", BEGUN, now)
