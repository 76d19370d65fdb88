# SPDX-License-Identifier: Apache-2.0
"""The part of a call that predicts: guided logits, one scale after the other."""

from collections.abc import Callable, Mapping, Sequence

import torch

from ..priors import VARCache
from ..priors.modeling_blocks import BlockTransformer
from .sampling import apply_guidance


class ScalePredictor:
    """
    Runs a transformer over the scales: tracks which inputs it has read, keeps its cache, and doubles the batch for guided
    scales. `steps` run each scale alone, as the transformer or in a compiled form; `condition` holds the arguments of the
    first call, with an unconditional second half of the batch if `last_guided`, the last guided scale, is not -1.
    """

    def __init__(
        self,
        steps: Sequence[Callable],
        transformer: BlockTransformer,
        cache: VARCache,
        condition: Mapping[str, torch.Tensor],
        last_guided: int,
        refiner: BlockTransformer | None = None,
        refiner_start: int = 0,
    ):
        self.steps, self.model, self.cache = steps, transformer, cache
        self.condition, self.last_guided = dict(condition), last_guided
        self.refiner, self.refiner_start = refiner, refiner_start
        self.num_read = 0

    def logits(self, k: int, scale_inputs: Sequence[torch.Tensor | None], weight: float) -> torch.Tensor:
        """
        Logits `(batch, length of scale k, codebook_size)`, guided by `weight`, from the inputs of all scales up to `k`:
        those that the model has not read yet are read in one pass.
        """
        if self.refiner is not None and k >= self.refiner_start:
            self._switch_to(self.refiner)
        guided = k <= self.last_guided
        if not guided and self.last_guided >= 0:
            self._drop_unconditional_half()
        unread = [inputs for inputs in scale_inputs[self.num_read : k + 1] if inputs is not None]
        inputs = torch.cat(unread, dim=1) if unread else None
        if guided and inputs is not None:
            inputs = inputs.repeat(2, 1, 1)
        step = self.steps[k] if self.num_read == k else self.model
        # A cache remembers the condition after its first call.
        condition = self.condition if self.num_read == 0 else {}
        logits = step(**condition, scale_inputs=inputs, cache=self.cache).logits
        self.num_read = k + 1
        logits = logits[:, -self.model.config.block_lengths[k] :]
        return apply_guidance(logits, weight) if guided else logits

    def _switch_to(self, refiner: BlockTransformer) -> None:
        self.model, self.num_read, self.refiner = refiner, 0, None
        self.cache = VARCache(refiner.config, self.cache.layer_hooks)
        self.steps = [refiner] * len(self.steps)

    def _drop_unconditional_half(self) -> None:
        """No later scale is guided."""
        self.last_guided = -1
        self.condition = {name: value.chunk(2)[0] for name, value in self.condition.items()}
        if self.num_read > 0:
            example = next(iter(self.condition.values()))
            self.cache.batch_select_indices(torch.arange(len(example), device=example.device))
