# SPDX-License-Identifier: Apache-2.0
"""The options of sampling that have a plain value, without the pipelines that have them."""

from collections.abc import Mapping


# What a command line can give and a report or a model card can state: type and meaning.
PLAIN_OPTIONS: Mapping[str, tuple[type, str]] = {
    "guidance_scale": (float, "1 is off (default: the checkpoint's, or 2.5)"),
    "top_k": (int, "0 is off (default: 900, or all of a smaller codebook)"),
    "top_p": (float, "0 and 1 are off (default: the checkpoint's, or 0.96)"),
    "temperature": (float, "above 1 for more variety (default: the checkpoint's, or 1)"),
    "smooth": (bool, "mix code vectors: smoother, less detailed images"),
}
