# SPDX-License-Identifier: Apache-2.0
"""The arguments that all pipelines share are listed once."""

import inspect

import pytest
import torch

from hf_var import VARImg2ImgPipeline, VARInpaintPipeline, VARPipeline
from hf_var.pipelines.options import SAMPLING_DEFAULTS, CallOptions, SamplingOptions
from hf_var.plain_options import PLAIN_OPTIONS


PIPELINES = [VARPipeline, VARImg2ImgPipeline, VARInpaintPipeline]


def test_the_lists_of_options_agree():
    assert SAMPLING_DEFAULTS.keys() == SamplingOptions.__annotations__.keys()
    assert PLAIN_OPTIONS.keys() < SAMPLING_DEFAULTS.keys() < CallOptions.__annotations__.keys()


@pytest.mark.parametrize("pipeline_class", PIPELINES)
def test_every_option_is_shown_and_documented(pipeline_class):
    parameters = inspect.signature(pipeline_class.__call__).parameters
    assert CallOptions.__annotations__.keys() < parameters.keys()
    documentation = inspect.getdoc(pipeline_class.__call__) or ""
    documented = (
        parameters if pipeline_class is VARPipeline else parameters.keys() - CallOptions.__annotations__.keys()
    )
    assert [name for name in documented if name != "self" and f"{name} (" not in documentation] == []


@pytest.mark.parametrize("pipeline_class", PIPELINES)
@pytest.mark.parametrize(("name", "hint"), [("guidance", "did you mean `guidance_scale`"), ("steps", "it takes call")])
def test_an_unknown_option_is_refused(pipe, pipeline_class, name, hint):
    made = pipeline_class.from_pipe(pipe)
    images = {"image": torch.zeros(3, 8, 8), "mask_image": torch.zeros(8, 8)}
    own = {key: value for key, value in images.items() if key in inspect.signature(made.__call__).parameters}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'; {hint}"):
        made(**own, class_labels=0, **{name: 2})
