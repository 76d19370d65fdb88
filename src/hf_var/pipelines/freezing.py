# SPDX-License-Identifier: Apache-2.0
"""The transformer compiled for CPUs, with its weights as constants."""

from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor_config
from diffusers.utils import logging

from ..autoencoders import VQVAEModel
from ..priors import VARCache, VARTransformer, VARTransformerOutput


logger = logging.get_logger(__name__)

# What is written through `.data`, as PEFT's merging and diffusers' average do, changes neither address nor version.
NUM_SAMPLED_VALUES = 64


class FrozenModels:
    """
    The steps of a transformer after the first one as a compiled graph, whose weights are constants (torch's "freezing"):
    oneDNN arranges them once as it will read them, and Inductor fuses what lies around the products. One graph is for any
    number of tokens and images, because each holds a copy of the weights. The decoder gains little or loses, and is left as it is.

    Args:
        transformer ([`VARTransformer`]): Predicts the token maps.
        vqvae ([`VQVAEModel`]): Decodes them.
        options: Those of `torch.compile`.
    """

    def __init__(self, transformer: VARTransformer, vqvae: VQVAEModel, **options: Any):
        self.transformer, self.vqvae, self.options = transformer, vqvae, options
        # The first scale reads its own weights, those of AdaLN, for a single token.
        self.steps = [transformer, *[self._step] * (len(transformer.config.patch_nums) - 1)]
        self.decode: Any = vqvae.decode
        self._predict = torch.compile(transformer.predict, **{"dynamic": True, "isolate_recompiles": True, **options})
        self._weights: list[tuple] | None = None
        self._has_warned = False
        self._lent: dict[int, VARCache] = {}

    def __reduce__(self) -> tuple:
        # Copied with its models, not with the code that was made of them.
        return partial(type(self), **self.options), (self.transformer, self.vqvae)

    @torch.no_grad()
    def lend(self, conditions: dict[str, torch.Tensor]) -> VARCache | None:
        """
        An empty cache. `None`, with a warning, if the graph, which the first call makes, is not what the transformer is any
        more. [`FrozenModels.take_back`] ends the loan.
        """
        obstacle = find_obstacle(self.transformer)
        if obstacle is None:
            weights = _describe(self.transformer)
            if self._weights is None:
                self._weights = weights
            if weights != self._weights:
                # Not compiled anew at once: torch keeps the old graph, and with it its copy of the weights.
                obstacle = "its weights have changed"
        if obstacle is not None:
            if not self._has_warned:
                logger.warning(f"The transformer is run as it is until `compile()` is called again: {obstacle}.")
            self._has_warned = True
            return None
        self._has_warned = False
        cache = VARCache(self.transformer.config)
        self._lent[id(cache)] = cache
        return cache

    def has_lent(self, cache: VARCache) -> bool:
        """Whether `cache` is one of [`FrozenModels.lend`]."""
        return id(cache) in self._lent

    def take_back(self, cache: VARCache) -> None:
        """End a loan, whether the call succeeded or not."""
        del self._lent[id(cache)]

    def _step(self, scale_inputs: torch.Tensor, past_key_values: VARCache) -> VARTransformerOutput:
        """What the transformer itself returns for a block after the first one, without its checks."""
        hidden_states = self.transformer.embeddings(None, scale_inputs, past_key_values.get_seq_length())
        _mark_sizes(hidden_states, past_key_values)
        # For this thread and step. Among the `options` Inductor would see it, but not Dynamo, which decides what is constant.
        with inductor_config.patch(freezing=True):
            logits = self._predict(hidden_states, past_key_values=past_key_values)
        return VARTransformerOutput(logits=logits, past_key_values=past_key_values)


def _mark_sizes(hidden_states: torch.Tensor, cache: VARCache) -> None:
    """
    Say which sizes vary, tokens and images. Otherwise Dynamo takes equal ones for the same, such as four images and four
    tokens, and makes another graph where they are not.
    """
    buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]  # pyright: ignore[reportAttributeAccessIssue]
    per_image = (hidden_states, *buffers, *cache.modulations.values())
    for tensor, dim in [(hidden_states, 1), *((tensor, 0) for tensor in per_image)]:
        # A graph for a single one is always another.
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def find_obstacle(transformer: VARTransformer) -> str | None:
    """Why the weights of `transformer` cannot be constants of a graph; `None` if they can."""
    tensors = [tensor.detach() for tensor in (*transformer.parameters(), *transformer.buffers())]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return "its weights are not all on the CPU"
    if any(type(tensor) is not torch.Tensor for tensor in tensors):
        return "it is quantized"
    # The graph begins behind the embeddings, where nobody calls the model itself.
    if "forward" in vars(transformer) or transformer._forward_hooks or transformer._forward_pre_hooks:
        return "it has hooks"
    return None


def _describe(transformer: VARTransformer) -> list[tuple]:
    """What changes with the weights of the graph: addresses, torch's counts of changes, and some of the values."""
    parts = (transformer.layers, transformer.head_norm, transformer.head)
    return [
        (
            tensor.data_ptr(),
            0 if tensor.is_inference() else tensor._version,
            tensor.dtype,
            # Odd steps, so that the values lie in many columns.
            tensor.flatten()[:: tensor.numel() // NUM_SAMPLED_VALUES | 1].tolist(),
        )
        for part in parts
        for tensor in (*part.parameters(), *part.buffers())
    ]
