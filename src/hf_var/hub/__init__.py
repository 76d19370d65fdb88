# SPDX-License-Identifier: Apache-2.0
"""Publishing on the Hub: model cards, names and uploads."""
