# SPDX-License-Identifier: Apache-2.0
"""Components of training runs: optimization, losses, codebook, checkpoints and logs, each with its configuration."""
