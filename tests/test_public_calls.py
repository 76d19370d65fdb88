# SPDX-License-Identifier: Apache-2.0
"""Whatever is passed to anything public: it works, or an error names an argument."""

import pytest

from fuzz_public_calls import fuzz


@pytest.mark.parametrize("num_calls", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_wrong_arguments_are_refused_by_name(num_calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends, failures = fuzz(num_calls, seed=0)
    assert failures == []
    assert ends.total() == num_calls
    assert ends["pipelines", "success"] > 0
    assert ends["pipelines", "refused"] > num_calls / 4
