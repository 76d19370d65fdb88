# SPDX-License-Identifier: Apache-2.0
"""What two or more example scripts share: arguments, data, optimisation, checkpoints and the codebook's start."""
