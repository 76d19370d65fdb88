# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines of the models of ordinary ones."""

from typing import Any

from hf_var import VARAutoBlocks, VARPipeline, VARTextAutoBlocks


def modular_of(pipe: Any, blocks: Any = None) -> Any:
    """A modular pipeline with the models and the defaults of an ordinary one."""
    if blocks is None:
        blocks = VARAutoBlocks() if isinstance(pipe, VARPipeline) else VARTextAutoBlocks()
    made = blocks.init_pipeline()
    defaults = {name: value for name, value in pipe.config.items() if name in made._config_specs}
    components = {name: value for name, value in pipe.components.items() if value is not None}
    made.update_components(**components, **defaults)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, **inputs: Any) -> tuple[Any, Any]:
    """Images and codes of a modular pipeline."""
    found = pipe(**inputs, output=["images", "codes"])
    return found["images"], found["codes"]
