# SPDX-License-Identifier: Apache-2.0
"""Where foreign checkpoints come from, and the licences of code and released weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A public code base; licences by the Hub's identifiers, `None` where the repository does not state one."""

    name: str
    url: str
    code_license: str
    weights_license: str | None


_VAR = Origin("VAR", "https://github.com/FoundationVision/VAR", "mit", "mit")
_ROSINALITY = Origin(
    "vq-vae-2-pytorch", "https://github.com/rosinality/vq-vae-2-pytorch", "mit and apache-2.0, see its LICENSE", None
)
_TAMING = Origin("taming-transformers", "https://github.com/CompVis/taming-transformers", "mit", "mit")
# Its weights are for non-commercial use, unlike its code.
_RQ = Origin("rq-vae-transformer", "https://github.com/kakaobrain/rq-vae-transformer", "apache-2.0", "cc-by-nc-sa-4.0")
# By what is converted, as `hf-var convert` calls it.
ORIGINS = {
    "var": _VAR,
    "vqvae": _VAR,
    "vqvae2": _ROSINALITY,
    "pixelsnail": _ROSINALITY,
    "pixelcnn": Origin("pytorch-vqvae", "https://github.com/ritheshkumar95/pytorch-vqvae", "not stated", None),
    "taming_vqgan": _TAMING,
    "taming_gpt": _TAMING,
    "rqvae": _RQ,
    "rq_transformer": _RQ,
}
