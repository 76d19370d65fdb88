# SPDX-License-Identifier: Apache-2.0
"""Somebody without a token, who knows diffusers and only imports this package so that it is registered."""

import sys
from pathlib import Path

import pytest
from common import assert_draws
from diffusers import DiffusionPipeline
from transformers import AutoModel

import hf_var


reference = Path(sys.argv[1])
pipe = DiffusionPipeline.from_pretrained("user/pipeline", revision="v1.0")
assert type(pipe) is hf_var.VARPipeline
assert_draws(pipe, reference / "first.npz")

with pytest.raises(OSError, match="user/private"):
    DiffusionPipeline.from_pretrained("user/private")
with pytest.raises(OSError, match="user/private"):
    hf_var.VARPipeline.from_pretrained("user/private")
with pytest.raises(OSError, match="user/private"):
    AutoModel.from_pretrained("user/private", subfolder="transformer")
