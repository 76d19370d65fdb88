# SPDX-License-Identifier: Apache-2.0
"""Real components small enough to draw in milliseconds, with weights that give contrast."""

import torch

from hf_var import VARConfig, VARPipeline, VARTransformer, VQVAEConfig, VQVAEModel


SCHEDULE = {"codebook_size": 32, "latent_channels": 4, "patch_nums": (1, 2, 4)}
LABEL_NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "snowy owl, Arctic owl", 4: "crane"}


def make_vqvae(seed: int = 0, **config) -> VQVAEModel:
    """A tokenizer of 8x8 images, unless `config` says otherwise."""
    sizes = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "norm_num_groups": 4}
    return _rescale(VQVAEModel(VQVAEConfig(**{**SCHEDULE, **sizes, **config})), seed)


def make_transformer(seed: int = 1, **config) -> VARTransformer:
    """A transformer whose labels have the names `LABEL_NAMES`, unless `config` says otherwise."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {} if "num_labels" in config else {"id2label": LABEL_NAMES}
    model = _rescale(VARTransformer(VARConfig(**{**SCHEDULE, **sizes, **labels, **config})), seed)
    with torch.no_grad():
        # Between a coin toss and a foregone conclusion: the most likely code has about a third.
        model.head.weight.mul_(1.5)
    return model


def make_pipeline(transformer: dict | None = None, vqvae: dict | None = None, **schedule) -> VARPipeline:
    """A pipeline of tiny components; `schedule` goes to both, the two dictionaries to one of them."""
    pipe = VARPipeline(make_transformer(**schedule, **transformer or {}), make_vqvae(**schedule, **vqvae or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _rescale(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    # Fresh weights draw grey images from uniform logits, and any tolerance would pass.
    generator = seeded(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embedding" in name or "codebook" in name else parameter[0].numel()
            parameter.normal_(std=fan_in**-0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()
