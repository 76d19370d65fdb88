# SPDX-License-Identifier: Apache-2.0
"""The demo app as a Space: `python app.py`. Another model is another folder or Hub repository in its place."""

import torch

from hf_var import EMOJI_CHECKPOINT, VARTextToImagePipeline
from hf_var.app import launch_app


launch_app(VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32), title="Emoji from texts")
