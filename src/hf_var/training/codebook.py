# SPDX-License-Identifier: Apache-2.0
"""
k-means initialization, restarts of dead codes and moving averages for the codebook.

Without them a tokenizer trained from scratch settles on a few codes per scale: an untrained encoder's features lie close
together, the few codes nearest to them take all gradients, and the rest are never chosen again.

A [`VQVAEModel`] has one codebook for all scales, a [`HierarchicalVQVAEModel`] one for each level.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import broadcast, reduce
from torch.nn import functional

from ..autoencoders import Tokenizer, TokenizerConfig
from ..autoencoders.codebook import AveragedCodebook, BaseCodebook
from ..metrics.codebook_usage import DEAD_THRESHOLD, is_dead
from ..scales import bounds


# k-means sees at most this many vectors of each scale, in each of these rounds.
VECTORS_PER_SCALE, ROUNDS = 8192, 3
# The weight of the past in a code's moving average, gamma in van den Oord et al. (2017), appendix A.1.
DECAY = 0.99
# How long the noise is that tells codes apart which restart at the same vector.
RESTART_NOISE = 0.01


class CodebookPart(NamedTuple):
    """A codebook, and the scales that look their vectors up in it: `scale_lengths`, from the token `begin` on."""

    codebook: BaseCodebook
    scale_lengths: list[int]
    begin: int

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Those of the codebook, of codes or vectors of all scales `(batch, length, ...)`."""
        return values[:, self.begin : self.begin + sum(self.scale_lengths)]

    def by_scale(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """`(batch, length, latent_channels)` vectors as `(batch * length of scale, latent_channels)` of its scales."""
        return [vectors.flatten(0, 1) for vectors in self.tokens(inputs).split(self.scale_lengths, dim=1)]


def codebook_parts(vqvae: Tokenizer) -> list[CodebookPart]:
    """Every codebook of a tokenizer with its scales, coarse to fine."""
    lengths = vqvae.config.scale_lengths
    number = len(lengths) // vqvae.config.num_codebooks
    groups = [lengths[first : first + number] for first in range(0, len(lengths), number)]
    begins = [begin for begin, _ in bounds([sum(group) for group in groups])]
    return [CodebookPart(*part) for part in zip(vqvae.codebooks, groups, begins, strict=True)]  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def initialize_codebook(vqvae: Tokenizer, part: CodebookPart, features: Sequence[Any], seed: int) -> None:
    """
    Set the codes of a codebook to k-means centres of the vectors that are looked up in it, equally many from each of its
    scales. `features` are those of encoded batches. What a scale looks up depends on the codes of the scales before it:
    the first round takes those to be exact, every further round starts from the codes so far and looks at the residuals
    that they really leave. All processes take the codes of the first.
    """
    from sklearn.cluster import KMeans, kmeans_plusplus

    weight = part.codebook.vectors
    generator = torch.Generator().manual_seed(seed)
    centers = None
    for _ in range(ROUNDS):
        inputs = torch.cat([vqvae.quantizer_inputs(batch, exact=centers is None) for batch in features]).cpu()
        sample = torch.cat([_choose(vectors, VECTORS_PER_SCALE, generator) for vectors in part.by_scale(inputs)])
        if len(sample) < len(weight):
            raise ValueError(
                f"`kmeans_images` gives {len(sample)} vectors ({len(inputs)} images), too few for a k-means start of "
                f"`codebook_size` = {len(weight)} codes."
            )
        # The cosine search uses only directions: codes that differ only in length would share their vectors.
        points = functional.normalize(sample, dim=-1) if vqvae.config.normalize_codebook else sample
        if centers is None:
            # k-means++ takes one pass over its points per centre, so it sees a part of them.
            start = _choose(points, 8 * len(weight), generator).numpy()
            centers, _ = kmeans_plusplus(start, len(weight), random_state=seed)
        means = KMeans(len(weight), init=centers, n_init=1, max_iter=20)  # pyright: ignore[reportArgumentType]
        means.fit(points.numpy())
        centers = means.cluster_centers_
        labels = torch.from_numpy(means.labels_).long()
        members = labels.bincount(minlength=len(weight)).clamp(min=1)
        vectors = torch.zeros(weight.shape).index_add_(0, labels, sample) / members[:, None]
        part.codebook.set_vectors(cast(torch.Tensor, broadcast(vectors.to(weight))))


def kmeans_vectors(config: TokenizerConfig, images: int) -> int:
    """How many vectors `images` images give [`initialize_codebook`] for a codebook, at least: it needs one per code."""
    numbers = [min(VECTORS_PER_SCALE, images * length) for length in config.scale_lengths]
    # Where each scale has its own codebook, the coarsest one has the fewest vectors.
    return sum(numbers[: len(numbers) // config.num_codebooks])


@torch.no_grad()
def restart_dead_codes(
    part: CodebookPart,
    hits: torch.Tensor,
    inputs: torch.Tensor,
    seed: int,
    threshold: float = DEAD_THRESHOLD,
) -> torch.Tensor:
    """Replace codes that `hits` show to be dead by random ones of the looked up `inputs`, and return them."""
    weight = part.codebook.vectors
    dead = is_dead(hits, threshold).nonzero().flatten().to(weight.device)
    if len(dead) > 0:
        candidates = torch.cat(part.by_scale(inputs))
        # Without duplicates: of two equal codes one would be dead again.
        vectors = _choose(candidates, len(dead), torch.Generator().manual_seed(seed)).to(weight)
        dead = dead[: len(vectors)]
        # The last process has the batch that a single process with accumulated gradients would have seen last.
        vectors = cast(torch.Tensor, broadcast(vectors, from_process=_num_processes() - 1))
        part.codebook.set_vectors(vectors, dead)
    return dead


class MovingAverages:
    """
    Codes as moving averages of the vectors that chose them (van den Oord et al. 2017, appendix A.1), in place of a
    gradient: of how many they are, `sizes`, and of their sum, `sums`. A codebook that has averages
    (`AveragedCodebook`) continues them, and keeps them up to date.
    """

    def __init__(self, part: CodebookPart, decay: float = DECAY, epsilon: float = 1e-5):
        self.part = part
        self.decay = decay
        self.epsilon = epsilon
        codebook, weight = part.codebook, part.codebook.vectors
        if weight.requires_grad:
            raise ValueError("The codebook's weight must not require a gradient if it follows moving averages.")
        if isinstance(codebook, AveragedCodebook):
            self.sizes, self.sums = codebook.average_hits, codebook.average_sums
        else:
            self.sizes, self.sums = torch.zeros(len(weight), device=weight.device), torch.zeros_like(weight)

    def _average(self, new_sizes: torch.Tensor, new_sums: torch.Tensor) -> None:
        """Take numbers and sums of vectors, those of all processes together, into the averages."""
        new = torch.cat([new_sizes[:, None], new_sums], dim=1)
        new = cast(torch.Tensor, reduce(new, reduction="sum"))  # (codebook_size, 1 + latent_channels)
        self.sizes.lerp_(new[:, 0], 1 - self.decay)
        self.sums.lerp_(new[:, 1:], 1 - self.decay)

    def _move(self) -> None:
        """Set the codes to their averages."""
        total = self.sizes.sum()
        smoothed = (self.sizes + self.epsilon) / (total + len(self.sizes) * self.epsilon) * total
        self.part.codebook.set_vectors(self.sums / smoothed[:, None])

    def _restart_at(self, size: torch.Tensor | float, codes: torch.Tensor | None) -> None:
        """Let the averages of `codes` (of all, if `None`) begin at their present vectors, with a weight."""
        weight = self.part.codebook.vectors
        chosen = torch.arange(len(weight), device=weight.device) if codes is None else codes
        self.sizes[chosen] = size
        self.sums[chosen] = weight[chosen] * size

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint."""
        return {"sizes": self.sizes, "sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where [`MovingAverages.state_dict`] was taken."""
        self.sizes.copy_(state_dict["sizes"])
        self.sums.copy_(state_dict["sums"])


class MovingAverageCodebook(MovingAverages):
    """
    [`MovingAverages`] that move the codes once per optimizer step, by all of its batches and processes. Vectors are
    weighted by the area of the latents that they cover, `1 / n` for a map of n tokens: so the codes minimise the error
    of the latents, and the many tokens of fine scales do not dominate. With scales of one size this is the plain
    average.
    """

    def __init__(self, part: CodebookPart, decay: float = DECAY, epsilon: float = 1e-5):
        super().__init__(part, decay, epsilon)
        if not self.sizes.any():
            self._restart_at(1.0, None)
        self._new_sizes, self._new_sums = torch.zeros_like(self.sizes), torch.zeros_like(self.sums)

    @torch.no_grad()
    def observe(self, vectors: torch.Tensor, codes: torch.Tensor) -> None:
        """Observe which `vectors` `(batch, length, channels)` chose which `codes` `(batch, length)` of all codebooks."""
        vectors, codes = self.part.tokens(vectors), self.part.tokens(codes)
        lengths = torch.tensor(self.part.scale_lengths, device=codes.device)
        areas = (lengths[-1] / lengths).repeat_interleave(lengths, output_size=codes.shape[1])  # (length,)
        self._new_sizes.index_add_(0, codes.flatten(), areas.expand(codes.shape).flatten())
        self._new_sums.index_add_(0, codes.flatten(), (vectors * areas[:, None]).flatten(0, 1))

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move the codes by what was observed since the last call."""
        self._average(self._new_sizes, self._new_sums)
        self._move()
        self._new_sizes.zero_()
        self._new_sums.zero_()

    @torch.no_grad()
    def restart(self, codes: torch.Tensor | None = None) -> None:
        """Let the averages of `codes` (of all, if `None`) begin at their present vectors, with an average weight."""
        self._restart_at(self.sizes.mean(), codes)


class SequentialMovingAverageCodebook(MovingAverages):
    """
    [`MovingAverages`] that move the codes in every forward pass after every scale, so that the next scale searches
    other codes already: RQ-VAE's training (Lee et al. 2022, official code). A code that was chosen by less than one
    vector on average is replaced by a random vector of the batch, if it `restarts`.
    """

    def __init__(self, part: CodebookPart, decay: float = DECAY, epsilon: float = 1e-5):
        super().__init__(part, decay, epsilon)
        if not self.sizes.any() and not self.sums.any():
            self.sums.copy_(part.codebook.vectors)
        # Codes that were replaced since the last step.
        self.restarted = torch.zeros(len(self.sizes), dtype=torch.bool, device=self.sizes.device)

    @torch.no_grad()
    def move(self, vectors: torch.Tensor, codes: torch.Tensor, restarts: torch.Generator | None = None) -> None:
        """
        After a scale whose `vectors` `(batch, length, channels)` chose `codes` `(batch, length)`: move the codes.
        Random vectors are those of the first process, whose generator `restarts` chooses them; without one nothing
        restarts.
        """
        vectors, codes = vectors.flatten(0, 1), codes.flatten()
        sizes, sums = torch.zeros_like(self.sizes), torch.zeros_like(self.sums)
        sizes.index_add_(0, codes, torch.ones_like(codes, dtype=sizes.dtype))
        self._average(sizes, sums.index_add_(0, codes, vectors))
        if restarts is not None:
            drawn = broadcast(_draw(vectors, len(self.sizes), restarts), from_process=0)
            is_unused = self.sizes < 1
            self.sizes.masked_fill_(is_unused, 1.0)
            self.sums.copy_(torch.where(is_unused[:, None], cast(torch.Tensor, drawn), self.sums))
            self.restarted |= is_unused
        self._move()

    @torch.no_grad()
    def restart(self, codes: torch.Tensor | None = None) -> None:
        """Let the averages of `codes` (of all, if `None`) begin at their present vectors, with the weight of one."""
        self._restart_at(1.0, codes)


def _draw(vectors: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Random ones of `(batch, channels)` vectors; if they are fewer, of these repeated with a little noise."""
    if len(vectors) < number:
        vectors = vectors.repeat(-(-number // len(vectors)), 1)
        noise = torch.rand(vectors.shape, generator=generator).to(vectors)
        vectors = vectors + noise * (RESTART_NOISE / vectors.shape[1] ** 0.5)
    return _choose(vectors, number, generator)


def _num_processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _choose(vectors: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    return vectors[torch.randperm(len(vectors), generator=generator)[:number].to(vectors.device)]
