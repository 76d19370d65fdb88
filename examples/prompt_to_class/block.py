# SPDX-License-Identifier: Apache-2.0
"""A block for modular pipelines: reads class labels off a text."""

import re

from diffusers import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam

from hf_var import VARTransformer


class PromptToClassStep(ModularPipelineBlocks):
    """The classes whose names stand in a prompt, in this order, so that whoever knows `prompt` alone can choose them."""

    @property
    def description(self) -> str:
        return "Reads class labels off a text, in which their names stand."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer", VARTransformer)]

    @property
    def inputs(self) -> list[InputParam]:
        textbox = {"mellon": "textbox"}
        return [
            InputParam("prompt", str, required=True, description="A text with names of classes.", metadata=textbox)
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        labels = OutputParam("class_labels", list[int], description="Ids of the classes, one image each.")
        return [labels, OutputParam("prompt", str, description="None: the labels stand for it.")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        # As in ImageNet, a name may be a list of synonyms.
        names = components.transformer.config.id2label.items()
        ids = {synonym.strip().lower(): label for label, name in names for synonym in name.split(",")}
        longest_first = sorted(map(re.escape, ids), key=len, reverse=True)
        found = re.findall(rf"\b({'|'.join(longest_first)})\b", block_state.prompt.lower())
        if not found:
            raise ValueError(
                f"`prompt` must hold names of classes, such as {next(iter(ids))!r}, got {block_state.prompt!r}."
            )
        block_state.class_labels, block_state.prompt = [ids[name] for name in found], None
        self.set_block_state(state, block_state)
        return components, state
