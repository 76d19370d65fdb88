# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that are run by hand now and then still fit the package."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_var import DIGITS_CHECKPOINT


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# They need Ray, which the tests do without.
OTHERS = {"tokenization_engines"}
NAMES = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - OTHERS)

TINY = ["--max_train_steps", "2", "--train_batch_size", "4", "--lr_warmup_steps", "0", "--output_dir", ""]
TINY_VQVAE = ["--in_channels", "1", "--base_channels", "8", "--channel_multipliers", "1", "2"]
TINY_VQVAE += ["--num_res_blocks", "1", "--norm_num_groups", "4", "--latent_channels", "4", "--codebook_size", "16"]
TINY_VQVAE += ["--patch_nums", "1", "2", "8"]
TINY_VAR = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """The module of a benchmark, which finds what it is made of beside it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load_module(name: str) -> ModuleType:
        spec = spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        # Where dataclasses look their annotations up.
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load_module


@pytest.fixture
def images(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [index % 2 for index in range(16)]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    return str(tmp_path / "train.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_what_it_imports_is_there(name: str, load) -> None:
    assert callable(load(name).main)


def test_the_loop_and_the_pipeline_choose_the_same_codes(load, capsys: pytest.CaptureFixture[str]) -> None:
    # The benchmark itself compares them.
    load("pixel_sampling").main(["--maps", "4", "--batch_size", "1", "--rows", "2", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:]] == [["4x4", "40", "19"]] * 3


@pytest.mark.parametrize(
    ("script", "sizes"),
    [("train_vqvae", TINY_VQVAE), ("train_var", [*TINY_VAR, "--vqvae", f"{DIGITS_CHECKPOINT}/vqvae"])],
)
def test_a_script_and_a_bare_loop_are_timed(
    script: str,
    sizes: list[str],
    images: str,
    load,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = load("training_throughput")
    monkeypatch.setattr(module, "STEPS", dict.fromkeys(module.STEPS, 20))
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["training_throughput.py", script, "--train_data", images, *TINY, *sizes])
    module.main()
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    rates = [float(found[name].split()[0]) for name in ("bare", "script")]
    assert min(rates) > 0
    assert float(found["script / bare"]) == pytest.approx(rates[1] / rates[0], rel=0.05)
