# SPDX-License-Identifier: Apache-2.0
"""The precision of fp32 matrix products is that of the run while it lasts, and torch's own after it."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hf_var.precision import ONEDNN_MATMUL, fp32_precision, is_onednn_exact
from hf_var.training import run
from hf_var.training.identity import RunIdentity
from hf_var.training.run import MATMUL_PRECISIONS, RunConfig, TrainingRun


def settings() -> tuple[str, str]:
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(("precision", "expected"), [("tf32", ("tf32", "tf32")), ("bf16", ("bf16", "tf32"))])
def test_settings_are_put_back_after_an_error(precision: str, expected: tuple[str, str]) -> None:
    before = settings()
    inside = []

    def fail() -> None:
        with fp32_precision(MATMUL_PRECISIONS[precision]):
            inside.append(settings())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert inside == [expected]
    assert settings() == before
    with fp32_precision(MATMUL_PRECISIONS["ieee"]):
        assert settings() == before


def test_blocks_that_overlap_set_them_back_when_the_last_ends() -> None:
    before = settings()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(fp32_precision({"mkldnn.matmul": "tf32"}))
        second.enter_context(fp32_precision({"mkldnn.matmul": "bf16"}))
        assert settings()[0] == "bf16"
        # As of two threads: not in the order of a stack.
        first.close()
        assert settings()[0] == "bf16"
        second.close()
    assert settings() == before
    with fp32_precision({"mkldnn.matmul": "bf16"}):
        with fp32_precision({"mkldnn.matmul": "tf32"}):
            assert settings()[0] == "tf32"
        assert settings()[0] == "bf16"
    assert settings() == before


def test_a_value_that_is_none_leaves_nothing_behind() -> None:
    before = settings()
    with (
        pytest.raises(RuntimeError, match="foo"),
        fp32_precision({"cuda.matmul": "tf32", "mkldnn.matmul": "foo"}),
    ):
        pass
    assert settings() == before
    with fp32_precision({"mkldnn.matmul": "bf16"}):
        assert settings()[0] == "bf16"
    assert settings() == before


def test_a_run_sets_them_until_it_ends(tmp_path) -> None:
    before = settings()
    config = RunConfig(output_dir=str(tmp_path), matmul_precision="bf16", report_to="none")
    with TrainingRun(config, Accelerator(cpu=True), "test", 1, RunIdentity({}, {})).started({}):
        assert settings() == ("bf16", "tf32")
    assert settings() == before


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_run_on_a_cpu_takes_onednn_where_it_rounds_nothing(tmp_path, monkeypatch, is_exact) -> None:
    monkeypatch.setattr(run, "is_onednn_exact", lambda: is_exact)
    before = settings()
    config = RunConfig(output_dir=str(tmp_path), report_to="none")
    training = TrainingRun(config, Accelerator(cpu=True), "test", 1, RunIdentity({}, {}))
    with training.started({}):
        assert settings() == (("bf16", before[1]) if is_exact else before)
    assert settings() == before
    # On other devices the library of the CPU is of no concern.
    training.accelerator = SimpleNamespace(device=torch.device("cuda"))
    assert training._matmul_switches() == {}


def test_products_stay_close() -> None:
    factors = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = factors[0].double() @ factors[1].double()
    with fp32_precision(MATMUL_PRECISIONS["bf16"]):
        product = factors[0] @ factors[1]
    # 8 bits of both factors where the hardware is faster so, all 24 where not.
    assert (product - exact).std() < 2**-8 * exact.std()


@pytest.mark.skipif(not is_onednn_exact(), reason="this CPU may round")
@pytest.mark.parametrize(("rows", "width"), [(2, 256), (512, 1024)])
def test_onednn_rounds_nothing_where_it_is_the_default(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, width, generator=generator), torch.randn(width, width, generator=generator)
    exact = left.double() @ right.double()
    with fp32_precision(ONEDNN_MATMUL):
        product = left @ right
    assert (product - exact).std() < 2**-20 * exact.std()


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ValueError, match="`matmul_precision` must be one of ieee, tf32, bf16, got 'fp8'"):
        RunConfig(output_dir="", matmul_precision="fp8")
