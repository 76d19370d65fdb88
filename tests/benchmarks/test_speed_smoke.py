# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks of speed: they run, through their command line, and what they compare computes the same.

How fast anything is depends on the machine, so the ratios are shown, not judged.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# They draw the same tokens; half precision may change any.
EQUAL = ("plain", "plain_onednn", "ours", "ours_mkl")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    """The scripts find what they share beside them, as a script does that Python runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def smoke(name: str, output_dir: Path, *arguments: str) -> dict:
    """The JSON file of a smoke run."""
    load_script(name).main(["--smoke", "--threads", "1", "--output_dir", str(output_dir), *arguments])
    model = "sampling_tiny" if name == "sampling" else f"{name}_tiny"
    return json.loads((output_dir / f"{model}.json").read_text(encoding="utf-8"))


def check_rows(report: dict, baseline: str) -> None:
    assert report["rows"]
    for row in report["rows"]:
        assert row["fastest"] <= row["median"] <= row["slowest"]
        assert len(row["seconds"]) >= 1
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("median", "per_image", "ratio"))
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        if row["variant"].endswith(baseline):
            assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1
        if row["floor_reached"] is not None:
            assert math.isfinite(row["floor_reached"])
            assert row["floor_reached"] > 0


def check_printed(capsys, report: dict) -> None:
    """The table on stdout has a line for each row, all of as many cells as the header. Shows the table to people."""
    output = capsys.readouterr().out
    with capsys.disabled():
        sys.stdout.write(f"\n{output}")
    lines = [line for line in output.splitlines() if line.startswith("|")]
    names = [line.split("|")[1].strip() for line in lines]
    first = names.index("variant")
    body = lines[first : first + 2 + len(report["rows"])]
    assert [line.split("|")[1].strip() for line in body[2:]] == [row["variant"] for row in report["rows"]]
    assert len({line.count("|") for line in body}) == 1


def test_sampling(tmp_path, capsys):
    report = smoke("sampling", tmp_path)
    check_printed(capsys, report)
    check_rows(report, "plain")
    assert report["skipped"] == {}
    batch_sizes = report["arguments"]["batch_sizes"]
    assert batch_sizes == [1, 2]
    for batch_size in batch_sizes:
        rows = {row["variant"]: row for row in report["rows"] if row["batch_size"] == batch_size}
        assert {*EQUAL, "ours_bf16"} <= rows.keys()
        for name in EQUAL[1:]:
            assert rows[name]["changed"] == 0, name
        assert 0 <= rows["ours_bf16"]["changed"] < 1
    extrapolated = {row["variant"] for row in report["rows"] if row["extrapolated"]}
    assert extrapolated == {"raster", "dit_25", "dit_250_onednn", "dit_xl_25_bf16"}
    for name in ("batch", "growth_time", "growth_operations"):
        assert (tmp_path / f"sampling_tiny_{name}.png").stat().st_size > 0
    exponents = {curve["name"]: curve["exponent"] for curve in report["growth"]}
    assert all(math.isfinite(exponent) for exponent in exponents.values())


def test_training(tmp_path, capsys):
    report = smoke("training", tmp_path)
    check_printed(capsys, report)
    check_rows(report, "plain")
    rows = {row["variant"]: row for row in report["rows"]}
    for name in {*rows} - {"plain"}:
        assert rows[name]["loss_error"] < (1e-2 if "bf16" in name else 1e-5), name
    assert all(math.isfinite(ratio["ratio"]) for ratio in report["against_images"].values())


def test_tokenizer(tmp_path, capsys):
    report = smoke("tokenizer", tmp_path)
    check_printed(capsys, report)
    check_rows(report, ": plain")
    rows = {row["variant"]: row for row in report["rows"]}
    assert rows["encode: ours"]["changed"] == rows["encode: ours_channels_last"]["changed"] == 0
    assert 0 <= rows["encode: ours_bf16"]["changed"] < 1
    # Equal codes say something only where there are many.
    assert report["different_codes"] > 8


def test_memory(tmp_path, capsys):
    report = smoke("memory", tmp_path, "--variants", "ours", "--batch_sizes", "2")
    check_printed(capsys, report)
    (row,) = report["rows"]
    assert 0 < row["weights"] < row["before"] <= row["peak"]
    # Exactly the positions of an image, and nothing beside them.
    assert row["cache_allocated"] == row["cache_counted"] > 0


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`variants` must be among"):
        smoke("tokenizer", tmp_path, "--variants", "fastest")


# --------------------------------------------------------------------------------------------------------------------
# The plain rendering


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_plain_algorithm_draws_our_images(qk_norm, guidance_scale):
    from speed import models, plain_var, plain_vqvae

    from hf_var import VARPipeline

    # Scales that are not square, and one refinement convolution for each.
    schedule = {"patch_nums": (1, 2, (2, 3), (4, 4)), "codebook_size": 48}
    transformer = models.make_transformer({**models.transformer_fields("tiny"), **schedule, "qk_norm": qk_norm})
    vqvae = models.make_vqvae({**models.vqvae_fields("tiny"), **schedule, "num_refinement_convs": 0})
    pipe = VARPipeline(transformer, vqvae)
    pipe.set_progress_bar_config(disable=True)
    plain, tokenizer = plain_var.PlainVAR(transformer), plain_vqvae.PlainVQVAE(vqvae)
    labels = [0, 3, 9, 1, 1, 2]
    settings = {"guidance_scale": guidance_scale, "top_k": 20, "top_p": 0.9}

    ours = pipe(labels, generator=torch.Generator().manual_seed(7), output_type="pt", **settings)
    images, codes = plain.sample(
        tokenizer, torch.tensor(labels), generator=torch.Generator().manual_seed(7), **settings
    )
    assert torch.equal(codes, ours.codes)
    torch.testing.assert_close(images, ours.images, atol=1e-5, rtol=0)
    # With other settings it draws others, so that equality is not for free.
    _, others = plain.sample(tokenizer, torch.tensor(labels), 1.7, 20, 0.9, generator=torch.Generator().manual_seed(7))
    assert (others != codes).float().mean() > 0.05
    assert len(codes.unique()) > 20
    assert images.std() > 0.1


def test_the_plain_training_step_has_our_gradients():
    from speed import models, plain_var

    transformer = models.make_transformer(models.transformer_fields("tiny")).train()
    plain = plain_var.PlainVAR(transformer, trainable=True)
    config, generator = transformer.config, torch.Generator().manual_seed(0)
    labels, codes = (
        torch.tensor([3, 1, 10]),
        torch.randint(config.codebook_size, (3, config.length), generator=generator),
    )
    scale_inputs = torch.randn(3, config.length - 1, config.latent_channels, generator=generator)

    loss = plain.training_loss(labels, scale_inputs, codes)
    expected = transformer(labels, scale_inputs=scale_inputs, labels=codes).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    attention = transformer.layers[0].attention
    parts = [getattr(attention, f"{name}_proj").weight.grad for name in ("q", "k", "v")]
    found = plain.weights["layers.0.attention.qkv.weight"].grad
    torch.testing.assert_close(found, torch.cat(parts), atol=1e-5, rtol=1e-4)
    assert found.abs().max() > 1e-3
    names = ["layers.1.adaln.linear.weight", "layers.1.mlp.fc2.bias", "embeddings.level_embedding", "head.weight"]
    for name in names:
        theirs = transformer.get_parameter(name).grad
        torch.testing.assert_close(plain.weights[name].grad, theirs, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("normalize_codebook", [False, True])
def test_the_plain_tokenizer_has_our_codes_and_images(normalize_codebook):
    from speed import models, plain_vqvae

    vqvae = models.make_vqvae({**models.vqvae_fields("tiny"), "normalize_codebook": normalize_codebook})
    models.calibrate(vqvae)
    plain = plain_vqvae.PlainVQVAE(vqvae.to(memory_format=torch.channels_last))
    images = models.random_images(vqvae, 8)
    with torch.no_grad():
        expected = vqvae.encode(images).codes
        decoded = vqvae.decode(expected).sample
    codes = plain.encode(images)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 20
    torch.testing.assert_close(plain.decode(codes), decoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.teacher_forcing(codes), vqvae.teacher_forcing(codes), atol=1e-5, rtol=0)
    assert decoded.std() > 0.1


# --------------------------------------------------------------------------------------------------------------------
# The other parts


def test_the_raster_decoder_shares_the_weights():
    from speed import models, peers

    fields = models.transformer_fields("tiny")
    transformer = models.make_transformer(fields)
    raster = peers.make_raster(fields, transformer)
    assert raster.config.block_lengths == [1] * 16
    shared = {parameter.data_ptr() for parameter in transformer.parameters()}
    own = [name for name, parameter in raster.named_parameters() if parameter.data_ptr() not in shared]
    assert own == ["embeddings.level_embedding", "embeddings.position_embedding"]


def test_counted_operations_of_a_raster_image_are_those_of_all_tokens():
    from speed import growth, machine, models

    from hf_var import VARCache, VARConfig

    config = VARConfig(**{**models.transformer_fields("tiny"), "patch_nums": (3,), "block_sizes": [1] * 9})
    transformer = machine.meta_transformer(config)
    cache = VARCache(transformer.config)
    one_by_one = sum(machine.block_flops(transformer, cache, 1, 1) for _ in range(9))
    assert growth.raster_flops(config) == one_by_one


def test_floor_counts_the_work_of_a_call():
    from speed import machine, models

    from hf_var import VARConfig, VQVAEConfig

    config = VARConfig(**models.transformer_fields("d16"))
    work = machine.sampling_work(config, VQVAEConfig(), 1, guided=True, dtype=torch.float32)
    # A decoder of 394 GFLOP, as `torch.utils.flop_counter` has it for the released tokenizer.
    assert work.decoder_flops == pytest.approx(394e9, rel=0.01)
    # Two multiplications and additions per weight and token, guidance included, attention beside them.
    weights = 16 * 12 * 1024**2 + 1024 * 4096
    assert sum(work.scale_flops) > 2 * 2 * 680 * weights
    assert sum(work.scale_flops) < 1.1 * 2 * 2 * 680 * weights
    assert work.cache_bytes == 2 * 16 * 2 * 680 * 1024 * 4
    # Without memory to wait for, and without arithmetic.
    arithmetic = work.floor(machine.Limits({"float32": 1e12}, math.inf), torch.float32)
    assert arithmetic == pytest.approx(work.flops / 1e12)
    memory = work.floor(machine.Limits({"float32": math.inf}, 1e9), torch.float32)
    assert memory == pytest.approx(sum(work.scale_bytes) / 1e9)


def test_ratios_are_of_the_same_round():
    from speed import clock

    times = {"slow": iter([4.0, 40.0]), "fast": iter([2.0, 10.0])}
    order = []

    def variant(name):
        def measure():
            order.append(name)
            return clock.Timed(next(times[name]))

        return measure

    series = clock.alternate({name: variant(name) for name in times}, rounds=2, warm_up=[])
    assert order == ["slow", "fast", "fast", "slow"]
    ratios = series["fast"].ratios(series["slow"])
    assert ratios == {"ratio": 3.0, "ratio_low": 2.0, "ratio_high": 4.0}


def test_what_is_recorded_in_the_second_call_is_measured_from_the_fourth_on():
    from speed import clock

    seconds = iter([50.0, 9.0, 2.0, 1.0, 1.5])
    calls = clock.calls_to_warm_up(torch.device("cuda"))
    assert clock.calls_to_warm_up(torch.device("cpu")) == 1
    series = clock.alternate({"compiled": lambda: clock.Timed(next(seconds))}, rounds=2, warm_up_calls=calls)
    assert series["compiled"].seconds == [1.0, 1.5]


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None)]
)
def test_the_rate_of_the_data_sheet_is_that_of_the_device(monkeypatch, name, expected):
    from speed import machine

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.bf16_peak(torch.device("cuda")) == expected
    assert machine.bf16_peak(torch.device("cpu")) is None


def test_the_onednn_switch_is_put_back():
    from speed import models

    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision

    def fail() -> None:
        with models.onednn_matmul():
            assert settings.fp32_precision == "bf16"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert settings.fp32_precision == before


@pytest.mark.slow
def test_one_command_runs_all(tmp_path, capfd):
    load_script("all_speed").main(["--smoke", "--threads", "1", "--output_dir", str(tmp_path), "--batch_sizes", "1"])
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"{job}_tiny.json" for job in ("sampling", "training", "tokenizer", "memory")} <= names
    assert {"speed.md", "sampling_size.png"} <= names
    text = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert capfd.readouterr().out.strip() == text.strip()
    for name in ("| ours_mkl |", "| encode: ours |", "| VAR, time |", "cache allocated, MB"):
        assert name in text, name
    report = json.loads((tmp_path / "sampling_tiny.json").read_text(encoding="utf-8"))
    assert {row["batch_size"] for row in report["rows"]} == {1}
