# SPDX-License-Identifier: Apache-2.0
"""What is published: cards, names and uploads."""
