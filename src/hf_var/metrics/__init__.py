# SPDX-License-Identifier: Apache-2.0
"""Measures of images, reconstructions, codes and likelihoods. None knows a training."""
