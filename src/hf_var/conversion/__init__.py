# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other code to our models and back, a file per code base: the only place that knows foreign key names."""

from .official_var import (
    export_official_var,
    export_official_vqvae,
    imagenet_id2label,
    load_official_var,
    load_official_vqvae,
)
from .origins import ORIGINS, Origin
from .pytorch_vqvae import export_pixelcnn, load_pixelcnn
from .rosinality import export_vqvae2, load_vqvae2
from .rosinality_pixelsnail import export_pixelsnail, load_pixelsnail
from .rq import export_rq_transformer, load_rq_transformer
from .rqvae import export_rqvae, load_rqvae
from .switti import export_switti, load_switti
from .taming import export_taming_gpt, load_taming_gpt
from .taming_vqgan import export_taming_vqgan, load_taming_vqgan, tokenizer_sections


__all__ = [
    "ORIGINS",
    "Origin",
    "export_official_var",
    "export_official_vqvae",
    "export_pixelcnn",
    "export_pixelsnail",
    "export_rq_transformer",
    "export_rqvae",
    "export_switti",
    "export_taming_gpt",
    "export_taming_vqgan",
    "export_vqvae2",
    "imagenet_id2label",
    "load_official_var",
    "load_official_vqvae",
    "load_pixelcnn",
    "load_pixelsnail",
    "load_rq_transformer",
    "load_rqvae",
    "load_switti",
    "load_taming_gpt",
    "load_taming_vqgan",
    "load_vqvae2",
    "tokenizer_sections",
]
