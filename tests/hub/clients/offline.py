# SPDX-License-Identifier: Apache-2.0
"""The machine of `pull.py` without a network: what it loaded, it loads again."""

import sys
from pathlib import Path

import torch
from common import assert_draws
from diffusers import DiffusionPipeline
from transformers import AutoModel

from hf_var import VARPipeline, VARTransformer


reference = Path(sys.argv[1])
assert_draws(VARPipeline.from_pretrained("user/pipeline"), reference / "second.npz")
assert_draws(DiffusionPipeline.from_pretrained("user/pipeline", revision="v1.0"), reference / "first.npz")
assert_draws(VARPipeline.from_pretrained("user/half", variant="fp16", dtype=torch.float16), reference / "half.npz")
assert_draws(
    VARPipeline(VARTransformer.from_pretrained("user/transformer"), AutoModel.from_pretrained("user/vqvae")),
    reference / "first.npz",
)
