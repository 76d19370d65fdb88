# SPDX-License-Identifier: Apache-2.0
"""The parts of the loop over the scales, of which pipelines and modular blocks are made."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ..autoencoders import VQVAEModel
from ..priors import VARCache
from ..priors.modeling_blocks import BlockTransformer
from .compilation import CompiledModels, FrozenModels, unwrapped
from .conditions import Condition
from .predictor import ScalePredictor
from .sampling import Generators, Guidance, Sampler, SamplingSettings, guidance_weight


class GivenCodes:
    """
    Codes `(batch, length)` of other images that replace sampled ones: all of the first `num_scales`, which are then not
    sampled, and the others at the positions `kept` `(batch, length)`.
    """

    def __init__(
        self, codes: torch.Tensor, scale_lengths: list[int], num_scales: int = 0, kept: torch.Tensor | None = None
    ):
        self.codes, self.num_scales = codes.split(scale_lengths, dim=1), num_scales
        self.kept = None if kept is None else kept.split(scale_lengths, dim=1)

    def put(
        self, k: int, codes: torch.Tensor, content: torch.Tensor, vqvae: VQVAEModel
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of scale `k` and its content (these codes, or vectors in their place) with the given ones in it."""
        if self.kept is None:
            return codes, content
        kept, given = self.kept[k], self.codes[k]
        mixed = torch.where(kept, given, codes)
        if not content.is_floating_point():
            return mixed, mixed
        return mixed, torch.where(kept[..., None], vqvae.code_vectors(given), content)


class ScaleSampling:
    """
    Images of which scale after scale is sampled: their `codes`, their `latents`, and what the transformer has yet to
    read. The steps of a scale are `predict`, `sample` and `add`.
    """

    def __init__(
        self,
        vqvae: VQVAEModel,
        predictor: ScalePredictor,
        settings: SamplingSettings,
        generator: Generators = None,
        given: GivenCodes | None = None,
    ):
        self.vqvae, self.predictor, self.settings, self.given = vqvae, predictor, settings, given
        self.num_scales = len(vqvae.config.patch_nums)
        self.latents: torch.Tensor | None = None
        self.codes: list[torch.Tensor] = []
        self._sampler = Sampler(settings, generator, self.num_scales)
        # At the first scale the model reads the condition alone.
        self._scale_inputs: list[torch.Tensor | None] = [None]
        for k in range(0 if given is None else given.num_scales):
            self.add(k, given.codes[k], given.codes[k])  # pyright: ignore[reportOptionalMemberAccess]

    @property
    def scales(self) -> range:
        """The scales that are left to sample."""
        return range(len(self.codes), self.num_scales)

    def predict(self, k: int, guidance_scale: Guidance) -> torch.Tensor:
        """Guided logits `(batch, length of scale k, codebook_size)`."""
        settings = self.settings
        window = settings.guidance_start, settings.guidance_end
        weight = guidance_weight(guidance_scale, k, self.num_scales, *window, settings.guidance_rule)
        return self.predictor.logits(k, self._scale_inputs, weight)

    def sample(self, k: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of scale `k`, and its content: these codes, or mixtures of vectors in their place."""
        codes, weights = self._sampler.draw(logits, k, self.codes)
        content = codes if weights is None else self.vqvae.mix_code_vectors(weights)
        # Kept codes are sampled, too, so that the random stream does not depend on the mask.
        return (codes, content) if self.given is None else self.given.put(k, codes, content, self.vqvae)

    def add(self, k: int, codes: torch.Tensor, content: torch.Tensor) -> None:
        """Add scale `k` to the latents."""
        self.codes.append(codes)
        self.latents, following = self.vqvae.next_scale(self.latents, content, k)
        self._scale_inputs.append(following)

    def replace_latents(self, k: int, latents: torch.Tensor) -> None:
        """Continue behind scale `k` from other latents."""
        self.latents = latents
        self._scale_inputs[-1] = self.vqvae.scale_inputs(latents, k + 1) if k + 1 < self.num_scales else None


@contextmanager
def scale_predictor(
    transformer: BlockTransformer,
    settings: SamplingSettings,
    condition: Condition,
    first_scale: int,
    device: torch.device,
    compiled: CompiledModels | FrozenModels | None = None,
) -> Iterator[ScalePredictor]:
    """What predicts the scales from `first_scale` on, with a cache for the time of a call."""
    config = transformer.config
    num_scales = len(config.patch_nums)
    last_guided = -1 if condition.is_unconditional else settings.last_guided_scale(num_scales)
    arguments = {}
    if first_scale < num_scales:
        arguments = condition.arguments(device, guided=last_guided >= 0)
    is_compiled = compiled is not None and compiled.transformer is unwrapped(transformer)
    if settings.layer_hooks:
        # Graphs are made without hooks.
        transformer, is_compiled = unwrapped(transformer), False
    is_compiled = is_compiled and arguments
    with compiled.cache(arguments) if is_compiled else nullcontext() as cache:  # pyright: ignore
        steps = [transformer] * len(config.block_lengths) if cache is None else compiled.steps  # pyright: ignore
        cache = VARCache(config, settings.layer_hooks) if cache is None else cache
        yield ScalePredictor(
            steps, transformer, cache, arguments, last_guided, settings.refiner, settings.refiner_start
        )
