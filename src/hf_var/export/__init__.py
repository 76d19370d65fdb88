# SPDX-License-Identifier: Apache-2.0
"""Models and pipelines as graphs for runtimes without torch: ONNX and OpenVINO."""

from .writing import export_model


__all__ = ["export_model"]
