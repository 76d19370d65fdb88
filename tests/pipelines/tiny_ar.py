# SPDX-License-Identifier: Apache-2.0
"""Pipelines of raster-order priors small enough to sample in milliseconds, with weights that make predictions differ."""

import torch

from hf_var import ARPipeline, PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig
from pipelines.tiny import make_vqvae, seeded


LABELS = 3


def make_tokenizer(patch_nums=(4,), codebook_size=12):
    return make_vqvae(in_channels=1, codebook_size=codebook_size, patch_nums=patch_nums, refinement_ratio=0.0)


def spread(model, seed=0):
    """`model` with weights that make its predictions differ."""
    source = seeded(seed)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=3.0 if "class_embedding" in name else 0.4, generator=source)
    return model.eval()


def make_pixelcnn(**fields):
    fields = {"num_labels": LABELS, "map_size": 4, "class_dropout_prob": 0.1} | fields
    return spread(PixelCNN(PixelCNNConfig(codebook_size=12, hidden_size=8, num_hidden_layers=3, **fields)))


def make_pixelsnail(seed=0, **fields):
    fields = {"num_labels": LABELS, "class_dropout_prob": 0.1, "num_blocks": 1, "num_res_blocks": 1} | fields
    sizes = {"hidden_size": 16, "residual_size": 16, "condition_hidden_size": 8, "num_condition_res_blocks": 1}
    return spread(PixelSNAIL(PixelSNAILConfig(codebook_size=12, kernel_size=3, **sizes, **fields)), seed)


def make_pipeline(levels=1, **defaults):
    if levels == 1:
        pipe = ARPipeline(make_tokenizer(), make_pixelcnn(), **defaults)
    else:
        top = make_pixelsnail(map_size=2)
        bottom = make_pixelsnail(1, map_size=4, condition_map_size=2, attention=False)
        pipe = ARPipeline(make_tokenizer((2, 4)), top, bottom_prior=bottom, **defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe
