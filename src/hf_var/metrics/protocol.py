# SPDX-License-Identifier: Apache-2.0
"""Numbers of the published protocols, without what computes with them."""

# Images that precision and recall look at around each image.
NUM_NEIGHBORS = 3
