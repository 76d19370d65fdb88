# SPDX-License-Identifier: Apache-2.0
"""Both stages together, as diffusers pipelines."""

from .pipeline_output import VARPipelineOutput
from .pipeline_var import VARPipeline


__all__ = ["VARPipeline", "VARPipelineOutput"]
