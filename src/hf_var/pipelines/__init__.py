# SPDX-License-Identifier: Apache-2.0
"""Both stages together, as diffusers pipelines."""

from .pipeline_ar import ARPipeline
from .pipeline_output import VARPipelineOutput
from .pipeline_var import VARPipeline
from .pipeline_var_img2img import VARImg2ImgPipeline
from .pipeline_var_inpaint import VARInpaintPipeline
from .pipeline_var_text import VARTextToImagePipeline
from .pipeline_var_text_img2img import VARTextImg2ImgPipeline
from .pipeline_var_text_inpaint import VARTextInpaintPipeline


__all__ = [
    "ARPipeline",
    "VARImg2ImgPipeline",
    "VARInpaintPipeline",
    "VARPipeline",
    "VARPipelineOutput",
    "VARTextImg2ImgPipeline",
    "VARTextInpaintPipeline",
    "VARTextToImagePipeline",
]
