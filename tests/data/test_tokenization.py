# SPDX-License-Identifier: Apache-2.0
"""Images to files of codes: what a row holds, and that it depends on nothing but the images and the arguments."""

import json
import random
import shutil
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset

from hf_var import VQVAEConfig, VQVAEModel, data
from hf_var.data.codes_files import ROWS_PER_GROUP, CodesFile, codes_table, count_codes
from hf_var.data.tokenization import TokenizationConfig
from hf_var.data.work_units import StreamedUnits

from .samples import broken_bytes, image_rows_of, numbered_contents, write_folder, write_parquet
from .tokenizing import NAMES, contents_of, make_vqvae, noise_contents, noise_images, rows_of, tokenize, write_named


@pytest.fixture(scope="module")
def vqvae() -> VQVAEModel:
    return make_vqvae()


@pytest.fixture(scope="module")
def vqvae_folder(vqvae: VQVAEModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vqvae")
    vqvae.save_pretrained(folder)
    return str(folder)


def codes_of(folder: Path) -> torch.Tensor:
    return torch.tensor(rows_of(folder)["codes"][:])


# --------------------------------------------------------------------------------------------------------------------
# What the rows hold


def test_rows_are_the_codes_of_the_centres(tmp_path: Path, vqvae: VQVAEModel, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(10))
    output_dir = tmp_path / "codes"
    count = tokenize(source, vqvae_folder, output_dir, rows_per_shard=4, batch_size=2)
    assert (count.rows, count.images, count.broken_images) == (10, 10, 0)
    assert list(contents_of(output_dir)) == [f"codes-0000{unit}-of-00003.parquet" for unit in range(3)]

    args = TokenizationConfig(data="", vqvae="", output_dir="")
    transform = data.ImageTransform(args, None, (8, 8), 1)
    pixel_values = torch.stack([transform(image) for image in noise_images(10)])
    with torch.no_grad():
        expected = torch.cat([vqvae.encode(batch).codes for batch in pixel_values.split(2)])
    assert len(expected.unique()) > 20, "too few codes to tell two images apart"
    rows = rows_of(output_dir)
    assert rows.features == Features({"codes": List(Value("uint16"), length=21), "label": ClassLabel(names=NAMES)})
    assert torch.equal(codes_of(output_dir), expected)
    assert rows["label"][:] == [index % 3 for index in range(10)]


def test_crops_and_mirrors_stand_next_to_each_other(tmp_path: Path, vqvae: VQVAEModel, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(6))
    values = {"num_crops": 2, "horizontal_flip": True, "seed": 5, "augment_rotation": 20.0}
    output_dir = tmp_path / "codes"
    assert tokenize(source, vqvae_folder, output_dir, batch_size=4, **values).rows == 24

    args = TokenizationConfig(data="", vqvae="", output_dir="", **(values | {"horizontal_flip": False}))
    transform = data.ImageTransform(args, args, (8, 8), 1)
    expected = []
    for index, image in enumerate(noise_images(6)):
        generator = random.Random((5 << 64) + index)
        crops = [transform(image, generator) for _ in range(2)]
        assert not torch.equal(*crops)
        sides = torch.stack([side for crop in crops for side in (crop, crop.flip(-1))])
        with torch.no_grad():
            expected.append(vqvae.encode(sides).codes)
    assert torch.equal(codes_of(output_dir), torch.cat(expected))
    assert rows_of(output_dir)["label"][:] == [index % 3 for index in range(6) for _ in range(4)]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_do_not_depend_on_batches_and_workers(tmp_path: Path, vqvae_folder: str, streaming: bool) -> None:
    source = str(tmp_path / "*.parquet")
    for shard in range(5):
        write_named(tmp_path / f"{shard}.parquet", noise_contents(20)[4 * shard : 4 * shard + 4])
    values = {"num_crops": 3, "streaming": streaming, "rows_per_shard": 6}
    tokenize(source, vqvae_folder, tmp_path / "one", batch_size=12, **values)
    # Batches of four images, and less than one image at a time.
    tokenize(source, vqvae_folder, tmp_path / "other", batch_size=2, dataloader_num_workers=2, **values)
    assert len(contents_of(tmp_path / "one")) == (5 if streaming else 4)
    assert contents_of(tmp_path / "one") == contents_of(tmp_path / "other")


def test_a_stream_gives_the_rows_of_the_index(tmp_path: Path, vqvae_folder: str) -> None:
    for shard in range(3):
        write_named(tmp_path / f"{shard}.parquet", noise_contents(12)[4 * shard : 4 * shard + 4])
    one, all_files = str(tmp_path / "1.parquet"), str(tmp_path / "*.parquet")
    for name, source, values in (
        ("centre", all_files, {}),
        ("random", one, {"num_crops": 2, "horizontal_flip": True}),
    ):
        for streaming in (False, True):
            values |= {"streaming": streaming, "batch_size": 4}
            tokenize(source, vqvae_folder, tmp_path / f"{name} {streaming}", **values)
        indexed, streamed = (rows_of(tmp_path / f"{name} {streaming}") for streaming in (False, True))
        assert indexed[:] == streamed[:]
        assert len(indexed) == (12 if name == "centre" else 16)
        assert indexed.features == streamed.features


def test_labels_are_kept_numbered_or_left_out(tmp_path: Path, vqvae_folder: str) -> None:
    named = write_named(tmp_path / "named.parquet", noise_contents(4))
    image_rows_of(noise_contents(4)).to_parquet(tmp_path / "plain.parquet")
    image_rows_of(noise_contents(4)).remove_columns("label").to_parquet(tmp_path / "none.parquet")
    cases = [
        (named, {"num_labels": 0}, None),
        (named, {"num_labels": 3}, ClassLabel(names=NAMES)),
        (str(tmp_path / "plain.parquet"), {}, Value("int64")),
        (str(tmp_path / "plain.parquet"), {"num_labels": 5}, ClassLabel(names=list("01234"))),
        (str(tmp_path / "none.parquet"), {"num_labels": 0}, None),
    ]
    for index, (source, values, feature) in enumerate(cases):
        output_dir = tmp_path / str(index)
        tokenize(source, vqvae_folder, output_dir, **values)
        rows = data.load_source("train_data", str(output_dir), None, ["train"])
        assert rows.features.get("label") == feature
        if feature is not None:
            assert rows["label"][:] == [0, 1, 2, 0]
    assert data.label_names(rows_of(tmp_path / "1"), "label") == dict(enumerate(NAMES))
    with pytest.raises(ValueError, match="Found no column of labels.*`num_labels` 0"):
        tokenize(str(tmp_path / "none.parquet"), vqvae_folder, tmp_path / "no")
    with pytest.raises(ValueError, match="`num_labels` is 2, but the data names the labels.*newt"):
        tokenize(named, vqvae_folder, tmp_path / "no", num_labels=2)
    with pytest.raises(ValueError, match="labels from 0 to 1, got values from 0 to 2"):
        tokenize(str(tmp_path / "plain.parquet"), vqvae_folder, tmp_path / "no", num_labels=2)
    assert not (tmp_path / "no").exists()


def test_large_codebooks_need_more_bits() -> None:
    for codebook_size, kind in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        schema = data.codes_schema(make_vqvae(codebook_size=codebook_size, latent_channels=1))
        assert Features.from_arrow_schema(schema) == Features({"codes": List(Value(kind), length=21)})


def test_row_groups_do_not_depend_on_batches(tmp_path: Path, vqvae: VQVAEModel) -> None:
    codes = torch.arange(2 * ROWS_PER_GROUP + 10)[:, None].remainder(64).expand(-1, 21).contiguous()
    schema = data.codes_schema(vqvae)
    for name, batch_size in (("many", 999), ("one", len(codes))):
        file = CodesFile(tmp_path / name, schema)
        for batch in codes.split(batch_size):
            file.add(codes_table(schema, batch))
        assert not (tmp_path / name).exists()
        file.finish()
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    table = pyarrow.parquet.ParquetFile(tmp_path / "one")
    assert [table.metadata.row_group(group).num_rows for group in range(3)] == [ROWS_PER_GROUP, ROWS_PER_GROUP, 10]
    assert table.read()["codes"].to_pylist() == codes.tolist()


# --------------------------------------------------------------------------------------------------------------------
# Going on


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path: Path, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", [*noise_contents(12), b"no image"])
    values = {"rows_per_shard": 4, "num_crops": 2, "max_broken_share": 0.5}
    count = tokenize(source, vqvae_folder, tmp_path / "whole", **values)
    expected = contents_of(tmp_path / "whole")
    assert len(expected) == 4

    folder = tmp_path / "stopped"
    tokenize(source, vqvae_folder, folder, **values)
    gone = "codes-00001-of-00004.parquet"
    (folder / gone).unlink()
    (folder / f".unfinished-{gone}").write_bytes(b"half a file")
    (folder / ".unfinished-settings").write_bytes(b"{")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("codes-*")}
    # In less memory, and faster.
    assert tokenize(source, vqvae_folder, folder, **values, batch_size=2, dataloader_num_workers=1) == count
    assert contents_of(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name for path in folder.iterdir()) == [".tokenization.json", "README.md", *sorted(expected)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_crops": 2}, "`num_crops` was 1 .*, got 2"),
        ({"horizontal_flip": True}, "`horizontal_flip` was False"),
        ({"seed": 1}, "`seed` was 0"),
        ({"resize_ratio": 1.0}, "`resize_ratio` was 1.125"),
        ({"rows_per_shard": 2}, "`rows_per_shard` was 10000"),
        ({"num_labels": 0}, "`num_labels` was None"),
        ({"streaming": True}, "`streaming` was False"),
        ({"data": "other.parquet"}, "`data` was .*images.parquet.*, got .*other.parquet"),
        ({"vqvae": "other_vqvae"}, "`vqvae` was '[0-9a-f]{16}'.*, got '[0-9a-f]{16}'"),
        ({"images": 5}, "`images` was 4 .*, got 5"),
    ],
)
def test_a_folder_belongs_to_one_run(tmp_path: Path, vqvae_folder: str, changed: dict, message: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(4))
    tokenize(source, vqvae_folder, tmp_path / "codes")
    before = contents_of(tmp_path / "codes")
    changed = dict(changed)
    if "data" in changed:
        changed = {"data": write_named(tmp_path / "other.parquet", noise_contents(4))}
    if "vqvae" in changed:
        make_vqvae(seed=1).save_pretrained(tmp_path / "other_vqvae")
        changed = {"vqvae": str(tmp_path / "other_vqvae")}
    if changed.pop("images", 0):
        write_named(tmp_path / "images.parquet", noise_contents(5))
    arguments = {"source": changed.pop("data", source), "vqvae_folder": changed.pop("vqvae", vqvae_folder)}
    with pytest.raises(ValueError, match=message):
        tokenize(**arguments, output_dir=tmp_path / "codes", **changed)
    assert contents_of(tmp_path / "codes") == before


def test_files_of_something_else_are_left_alone(tmp_path: Path, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(4))
    with pytest.raises(ValueError, match="`output_dir` = .*something else, such as 'images.parquet'"):
        tokenize(source, vqvae_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images.parquet"]


def test_a_stream_is_cut_smaller_for_many_processes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, numbered_contents(20), shards=1, row_group_size=3)
    dataset = data.load_source("data", source, None, ["train"], streaming=True)
    args = TokenizationConfig(data="", vqvae="", output_dir="", resize_ratio=1.0)
    read_row = data.image_rows(args, None, dataset, (8, 8), 1, condition=data.LabelCondition("label"))

    def numbers(units: StreamedUnits) -> list[list[int]]:
        """The rows of each unit."""
        found: list[list[int]] = [[] for _ in range(units.number)]
        for part in units.parts(list(range(units.number)), num_workers=0):
            if part.batch is not None:
                pixels = part.batch["pixel_values"][:, 0, 0, 3]
                found[part.unit] += (pixels * 127.5 + 127.5).round().int().tolist()
        return found

    alone = StreamedUnits(dataset, read_row, 0, 2, num_processes=1)
    assert alone.number == 1
    many = StreamedUnits(dataset, read_row, 0, 2, num_processes=3)
    assert many.number == 7
    assert all(numbers(many))
    assert sum(numbers(many), []) == sum(numbers(alone), []) == list(range(20))
    # Whoever goes on keeps the units.
    for number in (1, 3, 7):
        again = StreamedUnits(dataset, read_row, 0, 2, num_processes=2, number=number)
        assert again.number == number
        assert sum(numbers(again), []) == list(range(20))
    assert StreamedUnits(dataset, read_row, 0, 2, num_processes=1, number=9).settings == {"shards": 1, "units": 7}


# --------------------------------------------------------------------------------------------------------------------
# Broken images and bad input


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_left_out_and_counted(tmp_path: Path, vqvae_folder: str, streaming: bool, caplog) -> None:
    readable = noise_contents(8)
    # A whole unit of them in the end.
    for shard, contents in enumerate(
        (readable[:4], [*broken_bytes()[:2], *readable[4:6]], broken_bytes(), readable[6:])
    ):
        write_named(tmp_path / f"{shard}.parquet", contents)
    source = str(tmp_path / "*.parquet")
    values = {"rows_per_shard": 4, "num_crops": 2, "streaming": streaming}
    for _ in range(2):
        count = tokenize(source, vqvae_folder, tmp_path / "codes", **values)
        assert (count.rows, count.images, count.broken_images) == (16, 14, 6)
    assert "6 of 14 images cannot be read" in caplog.text
    for streaming_codes in (False, True):
        rows = data.load_source("train_data", str(tmp_path / "codes"), None, ["train"], streaming_codes)
        assert [row["label"] for row in rows] == [0, 0, 1, 1, 2, 2, 0, 0, 2, 2, 0, 0, 0, 0, 1, 1]
    assert [count_codes([path]).rows for path in sorted((tmp_path / "codes").glob("*.parquet"))] == [8, 4, 0, 4]


def test_too_many_broken_images_stop_the_run(tmp_path: Path, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", [b""] * 5 + noise_contents(100))
    with pytest.raises(ValueError, match="5 of 1.. images cannot be read, more than `max_broken_share` = 0.01"):
        tokenize(source, vqvae_folder, tmp_path / "codes")
    assert not (tmp_path / "codes" / "README.md").exists()
    assert tokenize(source, vqvae_folder, tmp_path / "codes", max_broken_share=0.1).broken_images == 5
    # Whether it goes on or not: the files tell how many there were.
    with pytest.raises(ValueError, match="5 of 105 images cannot be read"):
        tokenize(source, vqvae_folder, tmp_path / "codes")
    write_named(tmp_path / "all.parquet", broken_bytes())
    with pytest.raises(ValueError, match="No image of `data` = .*all.parquet' can be read"):
        tokenize(str(tmp_path / "all.parquet"), vqvae_folder, tmp_path / "none")


def test_bad_input_is_refused_before_any_work(tmp_path: Path, vqvae_folder: str) -> None:
    image_rows_of([]).to_parquet(tmp_path / "empty.parquet")
    Dataset.from_dict({"codes": [[1] * 21], "label": [0]}).to_parquet(tmp_path / "codes.parquet")
    source = write_named(tmp_path / "images.parquet", noise_contents(2))
    for values, message in (
        ({"data": str(tmp_path / "empty.parquet")}, "`data` = .* is empty"),
        ({"data": str(tmp_path / "empty.parquet"), "streaming": True}, "`data` = .* is empty"),
        ({"data": str(tmp_path / "codes.parquet")}, "`data` = .* has a column of codes already"),
        ({"data": str(tmp_path / "no*.parquet")}, "`data` = .* matches no file"),
        ({"image_column": "picture"}, "`image_column` = 'picture'"),
        ({"interpolation": "cubist"}, "`interpolation` must be one of"),
        ({"num_crops": 0}, "`num_crops` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"max_broken_share": 2.0}, "`max_broken_share` must be a share"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no, fp16, bf16"),
        ({"engine": "spark"}, "`engine` must be one of accelerate, ray, got 'spark'"),
        ({"ray_actors": 2}, "`ray_actors` = 2 needs `engine` = 'ray', got 'accelerate'"),
        ({"engine": "ray", "ray_actors": 0}, "`ray_actors` must be at least 1, got 0"),
        ({"engine": "ray", "dataloader_num_workers": 1}, "`dataloader_num_workers` must be 0 for `engine` = 'ray'"),
        ({"augment_zoom": 0.1}, "`augment_zoom` = 0.1 changes random crops: `num_crops` must be above 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(values.pop("data", source), vqvae_folder, tmp_path / "output", **values)
    assert not (tmp_path / "output").exists()


def test_ray_is_needed_for_its_engine_alone(
    tmp_path: Path, vqvae_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(2))
    for module in ("ray_engine", "ray_cluster"):
        monkeypatch.delitem(sys.modules, f"hf_var.data.{module}", raising=False)
        monkeypatch.delattr(data, module, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"`engine` = 'ray' needs `pip install hf_var\[ray\]`"):
        tokenize(source, vqvae_folder, tmp_path / "output", engine="ray")
    assert not (tmp_path / "output").exists()
    assert tokenize(source, vqvae_folder, tmp_path / "output").rows == 2


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer's fingerprint


def test_the_fingerprint_is_found_wherever_the_codes_lie(
    tmp_path: Path, vqvae: VQVAEModel, vqvae_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(4))
    output_dir = tmp_path / "codes"
    tokenize(source, vqvae_folder, output_dir, rows_per_shard=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "codes.parquet").write_bytes(next(iter(contents_of(output_dir).values())))
    for place in (output_dir, output_dir / "*.parquet", bare, bare / "codes.parquet", "~/codes", "~/codes/*.parquet"):
        assert data.codes_fingerprint(str(place)) == data.tokenizer_fingerprint(vqvae), place
    assert data.tokenizer_fingerprint(make_vqvae(seed=1)) != data.tokenizer_fingerprint(vqvae)

    Dataset.from_dict({"codes": [[1] * 21]}).to_parquet(bare / "codes.parquet")
    (tmp_path / "classes").mkdir()
    for place in (bare, bare / "*.parquet", source, write_folder(tmp_path / "classes", numbered_contents(3))):
        assert data.codes_fingerprint(str(place)) is None, place


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path: Path, vqvae_folder: str) -> None:
    source = write_named(tmp_path / "images.parquet", noise_contents(4))
    found = []
    for number, values in enumerate(({}, {"num_crops": 2}, {"num_crops": 2, "seed": 1})):
        # The last one takes the place of the one before.
        output_dir = tmp_path / str(min(number, 1)) / "codes"
        shutil.rmtree(output_dir, ignore_errors=True)
        tokenize(source, vqvae_folder, output_dir, **values)
        found.append(data.load_source("train_data", str(output_dir), None, ["train"])["codes"][:])
        assert found[-1] == rows_of(output_dir)["codes"][:]
    assert len(found[0]) == 4
    assert found[1] != found[2]


def test_the_card_tells_what_the_files_hold(tmp_path: Path, vqvae: VQVAEModel, vqvae_folder: str) -> None:
    (tmp_path / "images").mkdir()
    for split in ("train", "validation"):
        write_named(tmp_path / "images" / f"{split}.parquet", noise_contents(4))
    output_dir = tmp_path / "codes of birds"
    tokenize(
        str(tmp_path / "images"), vqvae_folder, output_dir, split="validation[:3]", license="cc0-1.0", num_crops=2
    )
    card = (output_dir / "README.md").read_text()
    assert f"`{data.tokenizer_fingerprint(vqvae)}`" in card
    assert "| rows | 6 |" in card
    assert "license: cc0-1.0" in card
    assert "num_crops: 2" in card
    assert str(tmp_path) not in card
    assert list(load_dataset(str(output_dir))) == ["train"]
    assert json.loads((output_dir / ".tokenization.json").read_text())["split"] == "validation[:3]"


@torch.no_grad()
def test_fingerprints_of_codes_outlive_new_kinds_of_tokenizers() -> None:
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    learned = VQVAEConfig(**sizes, latent_channels=4, codebook_size=16, patch_nums=(1, 2, 4))
    rounded = [
        VQVAEConfig(**sizes, patch_nums=(1,), quantizer="fsq", fsq_levels=levels) for levels in ((4, 3), (3, 4))
    ]
    found = []
    for config in (learned, *rounded):
        vqvae = VQVAEModel(config)
        for parameter in vqvae.parameters():
            parameter.zero_()
        found.append(data.tokenizer_fingerprint(vqvae))
    # What was computed before there was a choice of quantizers.
    assert found[0] == "277d3191f1da53f5"
    assert len(set(found)) == 3
