# SPDX-License-Identifier: Apache-2.0
"""diffusers' modular pipeline with our blocks."""

from typing import Any

from diffusers import ModularPipeline
from diffusers.modular_pipelines import ComponentSpec


class VARModularPipeline(ModularPipeline):
    r"""
    A pipeline of blocks ([`VARAutoBlocks`] unless others are given) that draws the images of [`VARPipeline`] and its
    sisters.

    `ModularPipeline.from_pretrained` makes one of every folder or repository of these pipelines, once hf_var is imported.
    Its arguments are those of diffusers' `ModularPipeline`.

    Example:

    ```python
    >>> import torch
    >>> from diffusers import ModularPipeline
    >>> from hf_var import DIGITS_CHECKPOINT

    >>> pipe = ModularPipeline.from_pretrained(DIGITS_CHECKPOINT)
    >>> pipe.load_components()
    >>> image = pipe(class_labels=3, generator=torch.Generator().manual_seed(0), output="images")[0]
    ```
    """

    default_blocks_name = "VARAutoBlocks"

    @staticmethod
    def _dict_to_component_spec(name: str, spec_dict: dict[str, Any]) -> ComponentSpec:
        if "repo" in spec_dict:
            # A component that a pipeline's folder names as null is not there, and diffusers loads from texts alone.
            is_there = spec_dict["type_hint"] != (None, None)
            place = {"repo": str(spec_dict["repo"])} if is_there else {"repo": None, "subfolder": ""}
            spec_dict = {**spec_dict, **place}
        return ModularPipeline._dict_to_component_spec(name, spec_dict)


class VARTextModularPipeline(VARModularPipeline):
    r"""
    A pipeline of blocks ([`VARTextAutoBlocks`] unless others are given) that draws the images of
    [`VARTextToImagePipeline`] and its sisters, see [`VARModularPipeline`].
    """

    default_blocks_name = "VARTextAutoBlocks"
