# SPDX-License-Identifier: Apache-2.0
"""Who takes part: models of two stages, by the scripts and recipes that train them, and the data sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .processes import REPOSITORY


RECIPES = REPOSITORY / "examples" / "recipes"
DIT = "benchmarks/racing/dit.py"


@dataclass(frozen=True)
class Training:
    """
    A training by a script of the repository.

    Args:
        name (`str`): Of its folder in the results.
        script (`str`): Path of the script.
        recipe (`str`, *optional*): Name of the recipe with `*` in place of the data set's, `name` and `_*` by default.
        recipes (`dict[str, str]`, *optional*): Names of the recipes by data set, where they are not called alike.
        share (`float`): Of the budget of its stage.
    """

    name: str
    script: str
    recipe: str | None = None
    recipes: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0

    def recipe_path(self, data: str) -> Path | None:
        """The file of the recipe; `None` for the script that has none."""
        if self.script == DIT:
            return None
        name = self.recipes.get(data) or (self.recipe or f"{self.name}_*").replace("*", data)
        return RECIPES / f"{name}.yaml"

    def exists(self, data: str) -> bool:
        """Whether the repository has script and recipe."""
        recipe = self.recipe_path(data)
        return (REPOSITORY / self.script).is_file() and (recipe is None or recipe.is_file())


@dataclass(frozen=True)
class Entrant:
    """
    A way to make images.

    Args:
        name (`str`): What the command line calls it.
        title (`str`): What tables call it.
        tokenizer (`Training`): The first stage. It has the whole budget if there is no second one.
        priors (`tuple[Training, ...]`): The second stage, the last of which makes a pipeline of all.
    """

    name: str
    title: str
    tokenizer: Training
    priors: tuple[Training, ...] = ()

    def exists(self, data: str) -> bool:
        """Whether the repository has all that it needs."""
        return all(training.exists(data) for training in (self.tokenizer, *self.priors))


VQVAE = "examples/train_vqvae.py"
KL = "examples/train_autoencoder_kl.py"
PIXEL_PRIOR = "examples/train_pixel_prior.py"
PLAIN = Training("vqvae_plain", VQVAE, "vqvae_*_plain")
# Latents that a second model learns, and latents that follow N(0, I).
LATENTS = Training("kl_latents", KL, recipes={"digits": "kl_digits_latents", "cifar10": "kl_cifar10"})
BOUND = Training("kl", KL, recipes={"digits": "kl_digits", "cifar10": "kl_cifar10_bound"})
ENTRANTS = (
    Entrant(
        "var",
        "VAR",
        Training("vqvae", VQVAE),
        (Training("var", "examples/train_var.py"),),
    ),
    Entrant("raster", "VAR in raster order", PLAIN, (Training("raster", "examples/train_var.py"),)),
    Entrant("gpt", "GPT of VQGAN", PLAIN, (Training("gpt", "examples/train_rq.py"),)),
    Entrant(
        "rq",
        "RQ-Transformer",
        Training("vqvae_rq", VQVAE, "vqvae_*_rq"),
        (Training("rq", "examples/train_rq.py"),),
    ),
    Entrant("pixelcnn", "PixelCNN", PLAIN, (Training("pixelcnn", PIXEL_PRIOR),)),
    Entrant(
        "pixelsnail",
        "VQ-VAE-2, PixelSNAIL",
        Training("vqvae2", VQVAE),
        (
            # The coarse map has a quarter of the codes.
            Training("pixelsnail_top", PIXEL_PRIOR, "pixelsnail_*_top", share=0.3),
            Training("pixelsnail", PIXEL_PRIOR, "pixelsnail_*_bottom", share=0.7),
        ),
    ),
    Entrant("dit", "latent diffusion, DiT", LATENTS, (Training("dit", DIT),)),
    Entrant("kl", "KL autoencoder alone", BOUND),
)


@dataclass(frozen=True)
class DataSet:
    """
    What the entrants race on.

    Args:
        name (`str`): As recipes are called.
        num_samples (`int`): Images that are sampled.
        tested (`int`): Unseen images whose likelihood and reconstruction are measured.
        reading (`dict[str, Any]`): How all scripts read images.
        augmentation (`dict[str, Any]`): How training images are changed at random.
        copies (`int`): Changed copies of an image that the second stage is trained on.
        dit (`dict[str, Any]`): Sizes and optimizer of the DiT, which has no recipe.
    """

    name: str
    num_samples: int
    tested: int
    reading: dict[str, Any]
    augmentation: dict[str, Any]
    copies: int
    dit: dict[str, Any] = field(default_factory=dict)


DIT_OPTIMIZER = {"weight_decay": 0.0, "adam_beta2": 0.999, "max_grad_norm": 1.0}
DATA_SETS = {
    "digits": DataSet(
        "digits",
        num_samples=1000,
        tested=899,
        reading={"resize_ratio": 1.0, "interpolation": "bicubic"},
        augmentation={
            "augment_rotation": 5,
            "augment_translation": 0.03,
            "augment_zoom": 0.08,
            "augment_shear": 5,
        },
        copies=64,
        # Layers, width and learning rate of var_digits.yaml.
        dit={
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "hidden_size": 128,
            "learning_rate": 3e-3,
            **DIT_OPTIMIZER,
            "ema_decay": 0.995,
        },
    ),
    "cifar10": DataSet(
        "cifar10",
        num_samples=5000,
        tested=2000,
        reading={"resize_ratio": 1.0},
        augmentation={"horizontal_flip": True},
        copies=1,
        # Layers, width and learning rate of var_cifar10.yaml.
        dit={
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "hidden_size": 192,
            "learning_rate": 1.5e-3,
            **DIT_OPTIMIZER,
            "ema_decay": 0.998,
        },
    ),
}


def find_entrants(names: list[str] | None, data: str) -> list[Entrant]:
    """The entrants of these names, or all that the repository can train on this data set, in the order of the tables."""
    known = {entrant.name: entrant for entrant in ENTRANTS}
    chosen = list(known) if names is None else names
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"`entrants` must be among {list(known)}, got {unknown}.")
    missing = [name for name in chosen if not known[name].exists(data)]
    if names is not None and missing:
        raise ValueError(f"There are no recipes or scripts for the entrants {missing} on {data}.")
    return [entrant for entrant in ENTRANTS if entrant.name in chosen and entrant.name not in missing]
