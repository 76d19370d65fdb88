# SPDX-License-Identifier: Apache-2.0
"""Metrics of images, reconstructions, codes and likelihoods, independent of training and evaluation runs."""
