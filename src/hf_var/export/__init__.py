# SPDX-License-Identifier: Apache-2.0
"""Models and pipelines as graphs for runtimes without torch: ONNX and OpenVINO."""

from .writing import FORMATS, export_model


__all__ = ["FORMATS", "export_model"]
