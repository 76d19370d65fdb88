# SPDX-License-Identifier: Apache-2.0
"""Curves of a training, read back point by point."""

import json

import pytest

from hf_var.training.curves import curves_plot


def test_curves_plot_reads_the_log(tmp_path) -> None:
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "validation_psnr": 20.0}]
    log = tmp_path / "train_log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = curves_plot(log, ["validation_psnr", "loss"], marks={"adversarial loss": 2})
    panels = [[list(map(tuple, line.get_xydata())) for line in axes.lines] for axes in figure.axes]
    assert [lines[0] for lines in panels] == [[(2.0, 20.0)], [(1.0, 0.5), (2.0, 0.25)]]
    assert all([x for x, _ in lines[1]] == [2, 2] for lines in panels)
    assert [text.get_text() for text in figure.axes[0].texts] == ["adversarial loss"]
    figure.savefig(tmp_path / "curves.png")
    for names in ([], ["loss", "lpips"]):
        with pytest.raises(ValueError, match=r"`names`.*\['loss', 'validation_psnr'\]"):
            curves_plot(log, names)
