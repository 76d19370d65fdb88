# SPDX-License-Identifier: Apache-2.0
"""What the tests of compiled pipelines share."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pipelines.tiny import seeded


SETTINGS = [
    pytest.param({}, id="plain"),
    pytest.param({"guidance_scale": 1.0}, id="unguided"),
    pytest.param({"guidance_scale": lambda k, num_scales: 3.0 if k < 2 else 1.0}, id="guided_at_first"),
    pytest.param({"smooth": True}, id="smooth"),
    pytest.param({"callback_on_step_end": lambda pipe, step, timestep, tensors: tensors}, id="callback"),
]


def draw(pipe, labels=(0, 1, None), **settings):
    return pipe(list(labels), generator=seeded(), output_type="pt", **settings)


def assert_same(output, expected):
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-5)


def make_copy(pipe):
    """The same models in a pipeline that is not compiled."""
    twin = type(pipe)(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    return twin


def compile_and_count(pipe, freezing: bool = False) -> CompileCounterWithBackend:
    """Compile `pipe` with the quick backend; `frame_count` of what is returned says how many graphs it has."""
    counter = CompileCounterWithBackend("eager")
    pipe.compile(freezing=freezing, backend=counter, fullgraph=True)
    return counter
