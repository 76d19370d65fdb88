# SPDX-License-Identifier: Apache-2.0
"""Which words are names on the Hub, and what of a path is published."""

from hf_var.hub.names import is_hub_name, public_recipe


def test_names_on_the_hub_and_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "local").mkdir(parents=True)
    assert [name for name in ("mnist", "user/birds", "a-b/c_d.v1") if not is_hub_name(name)] == []
    paths = ["owner/local", "owner", "/data", "./data", "~/data", "a/b/c", "data/*.tar", "data/train.parquet"]
    paths += ["C:\\data\\birds", "a/b/", "", "https://host/birds", "x" * 5000]
    assert [path for path in paths if is_hub_name(path)] == ["x" * 5000]
    recipe = {"a": "owner/local", "b": "user/birds", "c": ["/x/y.tar", "z"], "d": "C:\\x\\y\\", "e": None, "f": 1e-6}
    assert public_recipe(recipe).splitlines() == [
        "a: local",
        "b: user/birds",
        "c:",
        "- y.tar",
        "- z",
        "d: y",
        "f: 1.0e-06",
    ]
