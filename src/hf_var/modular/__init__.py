# SPDX-License-Identifier: Apache-2.0
"""Blocks of the pipelines of VAR transformers, for diffusers' modular pipelines."""

from .before_denoise import VARImageInputsStep, VARInpaintInputsStep, VARInputsStep
from .decoders import VARDecodeStep, VARInpaintDecodeStep
from .denoise import VARAddScaleStep, VARPredictStep, VARSampleStep, VARScaleLoop
from .encoders import VARClassStep, VARImageStep, VARInpaintStep, VARNoImageStep, VARTextEncoderStep
from .modular_blocks_var import VARAutoBlocks, VARTextAutoBlocks
from .modular_pipeline import VARModularPipeline, VARTextModularPipeline
from .settings import VARSettingsStep, VARTextSettingsStep


__all__ = [
    "VARAddScaleStep",
    "VARAutoBlocks",
    "VARClassStep",
    "VARDecodeStep",
    "VARImageInputsStep",
    "VARImageStep",
    "VARInpaintDecodeStep",
    "VARInpaintInputsStep",
    "VARInpaintStep",
    "VARInputsStep",
    "VARModularPipeline",
    "VARNoImageStep",
    "VARPredictStep",
    "VARSampleStep",
    "VARScaleLoop",
    "VARSettingsStep",
    "VARTextAutoBlocks",
    "VARTextEncoderStep",
    "VARTextModularPipeline",
    "VARTextSettingsStep",
]
