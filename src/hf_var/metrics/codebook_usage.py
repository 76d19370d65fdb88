# SPDX-License-Identifier: Apache-2.0
"""How well each scale uses the codebook, and how much of the features it leaves unexplained."""

from typing import Any, cast

import torch
from accelerate.utils import reduce

from ..autoencoders import VQVAEConfig, VQVAEModel


# A code is dead if it was chosen less than this many times as often as the average one.
DEAD_THRESHOLD = 0.03


class CodeStatistics:
    """Counts codes per scale, over many batches: a map of one token sees few codes in a batch, however well it works."""

    def __init__(self, config: VQVAEConfig, device: torch.device | str = "cpu"):
        self.codebook_size = config.codebook_size
        self.scale_lengths = config.scale_lengths
        self.hits = torch.zeros(len(config.scale_lengths), config.codebook_size, dtype=torch.long, device=device)
        self._pending = torch.zeros_like(self.hits)
        scales = torch.arange(len(config.scale_lengths))
        offsets = scales.repeat_interleave(torch.tensor(config.scale_lengths)) * config.codebook_size
        self._offsets = offsets.to(device)  # (length,)

    def count(self, codes: torch.Tensor) -> None:
        """Count the codes of a batch of this process, a tensor `(batch, length)`."""
        chosen = (codes + self._offsets).flatten()
        # torch.bincount would wait for the device, to see the largest code.
        self._pending.view(-1).index_add_(0, chosen, torch.ones_like(chosen))

    def synchronize(self) -> torch.Tensor:
        """How often each scale chose each code, `(scales, codebook_size)`, in all processes, which must all call it."""
        self.hits = self.hits + cast(torch.Tensor, reduce(self._pending, reduction="sum"))
        self._pending.zero_()
        return self.hits

    def reset(self) -> None:
        """Begin a new window."""
        self.hits = torch.zeros_like(self.hits)
        self._pending.zero_()

    def compute(self) -> dict[str, float]:
        """
        The metrics of the codes counted so far; all processes must call it.

        Returns:
            `dict[str, float]`: `usage` (share of the codes that any scale chose) and `dead_codes` (number of those chosen
            less than 3 % as often as the average one); and for every scale k `usage_k` (share of the codes that it
            chose), `perplexity_k` (exponential of the entropy: the number of equally frequent codes with the same
            entropy), `dead_codes_k` (number of codes it never chose) and `reached_k` (codes it chose, divided by the
            number that equally many uniformly random tokens reach on average; use it to judge coarse scales).
        """
        hits = self.synchronize().cpu()
        total = hits.sum(dim=0)
        metrics = {"usage": (total > 0).float().mean().item(), "dead_codes": float(is_dead(total).sum())}
        for scale, counts in enumerate(hits):
            tokens = int(counts.sum())
            used = int((counts > 0).sum())
            shares = counts[counts > 0].double() / max(tokens, 1)
            metrics[f"usage_{scale}"] = used / self.codebook_size
            metrics[f"perplexity_{scale}"] = float(torch.exp(-(shares * shares.log()).sum())) if used > 0 else 0.0
            metrics[f"dead_codes_{scale}"] = float(self.codebook_size - used)
            metrics[f"reached_{scale}"] = used / max(expected_codes(tokens, self.codebook_size), 1.0)
        return metrics

    def reachable(self) -> list[float]:
        """The share of the codes that equally many uniformly random tokens reach on average, by scale; after `compute`."""
        return [expected_codes(int(counts.sum()), self.codebook_size) / self.codebook_size for counts in self.hits]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For Accelerate's checkpoints, which store one state for all processes."""
        return {"hits": self.synchronize()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """For Accelerate's checkpoints."""
        self.hits.copy_(state_dict["hits"])


def expected_codes(tokens: int, codebook_size: int) -> float:
    """Expected number of different codes among `tokens` uniformly random ones."""
    return codebook_size * (1 - (1 - 1 / codebook_size) ** tokens)


@torch.no_grad()
def residual_energy(vqvae: VQVAEModel, features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Sum of squares of features and, after each scale, of the residual that their codes leave: `(1 + scales,)`."""
    features = features.float()
    errors = [features, *(features - latents for latents in vqvae.running_latents(codes))]
    return torch.stack([error.square().sum() for error in errors])


def energy_metrics(energy: torch.Tensor) -> dict[str, float]:
    """The share of the energy of [`residual_energy`] that each scale leaves, in all processes, which must all call it."""
    energy = cast(torch.Tensor, reduce(energy, reduction="sum"))
    return {f"residual_energy_{scale}": left for scale, left in enumerate((energy[1:] / energy[0]).tolist())}


def is_dead(hits: torch.Tensor, threshold: float = DEAD_THRESHOLD) -> torch.Tensor:
    """Which codes were chosen less than `threshold` times as often as the average one; `hits` is `(codebook_size,)`."""
    return hits < threshold * hits.float().mean()
