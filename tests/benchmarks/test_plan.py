# SPDX-License-Identifier: Apache-2.0
"""The plan of large trainings is what the page says, and follows from what is known."""

import sys
from pathlib import Path
from types import ModuleType

import pytest


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def plan(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    import plan

    return plan


def test_the_tables_of_the_page_are_those_of_the_plan(plan: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main()
    page = (REPOSITORY / "docs/scale.md").read_text(encoding="utf-8")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3
    for table in tables:
        assert table in page


def test_the_hours_of_d16_are_those_that_its_authors_needed(plan: ModuleType) -> None:
    job = plan.imagenet_job("d16", 256)
    assert job.num_parameters == 310_283_520
    assert job.images_seen == pytest.approx(200 * plan.IMAGENET_IMAGES, rel=1e-3)
    hours = job.flops / (plan.TRAINING_SHARE * plan.PEAKS["A100"]) / 3600
    assert hours == pytest.approx(16 * 2.5 * 24, rel=0.02)
