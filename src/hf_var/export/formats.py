# SPDX-License-Identifier: Apache-2.0
"""What graphs are written as."""

# What each format needs, and the ending of its files.
NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino")}
FORMATS = tuple(NEEDED)
