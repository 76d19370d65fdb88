# SPDX-License-Identifier: Apache-2.0
"""All blocks of a pipeline together, with the workflows that they know."""

from diffusers.modular_pipelines import OutputParam, SequentialPipelineBlocks

from .before_denoise import VARAutoInputsStep
from .decoders import VARAutoDecodeStep
from .denoise import VARScaleLoop
from .encoders import VARAutoImageStep, VARClassStep, VARTextEncoderStep
from .parameters import CODES, IMAGES, made
from .settings import VARSettingsStep, VARTextSettingsStep


class VARAutoBlocks(SequentialPipelineBlocks):
    r"""
    Images from class labels, variations of images and in-painting, as [`VARPipeline`], [`VARImg2ImgPipeline`] and
    [`VARInpaintPipeline`] make them.

    The workflows are `class2image`, `image2image` and `inpainting`; what is passed chooses among them.
    """

    block_classes = [
        VARSettingsStep,
        VARAutoImageStep,
        VARClassStep,
        VARAutoInputsStep,
        VARScaleLoop,
        VARAutoDecodeStep,
    ]
    block_names = ["settings", "image", "class_encoder", "inputs", "denoise", "decode"]
    _workflow_map = {
        "class2image": {"class_labels": True},
        "image2image": {"class_labels": True, "image": True},
        "inpainting": {"class_labels": True, "image": True, "mask_image": True},
    }

    @property
    def description(self) -> str:
        return "Samples images of classes, variations of images, and parts of images, scale by scale (VAR)."

    @property
    def outputs(self) -> list[OutputParam]:
        return made(IMAGES, CODES)


class VARTextAutoBlocks(SequentialPipelineBlocks):
    r"""
    Images from texts, variations of images and in-painting, as [`VARTextToImagePipeline`], [`VARTextImg2ImgPipeline`] and
    [`VARTextInpaintPipeline`] make them.

    The workflows are `text2image`, `image2image` and `inpainting`; what is passed chooses among them.
    """

    block_classes = [
        VARTextSettingsStep,
        VARAutoImageStep,
        VARTextEncoderStep,
        VARAutoInputsStep,
        VARScaleLoop,
        VARAutoDecodeStep,
    ]
    block_names = ["settings", "image", "text_encoder", "inputs", "denoise", "decode"]
    _workflow_map = {
        "text2image": {"prompt": True},
        "image2image": {"prompt": True, "image": True},
        "inpainting": {"prompt": True, "image": True, "mask_image": True},
    }

    @property
    def description(self) -> str:
        return "Samples images of texts, variations of images, and parts of images, scale by scale (VAR)."

    @property
    def outputs(self) -> list[OutputParam]:
        return made(IMAGES, CODES)
