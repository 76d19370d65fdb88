# SPDX-License-Identifier: Apache-2.0
"""What every block does: read its part of the state, work, write it back."""

from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipelineBlocks, PipelineState


class VARBlock(ModularPipelineBlocks):
    """A block of which subclasses write `run`."""

    def run(self, components: Any, block_state: Any, state: PipelineState) -> None:
        """Make the outputs in `block_state` from the inputs there; `state` also has what other blocks were given."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> Any:
        block_state: Any = self.get_block_state(state)
        self.run(components, block_state, state)
        self.set_block_state(state, block_state)
        return components, state
