# SPDX-License-Identifier: Apache-2.0
"""How near generated images come to real ones, by the protocol of published figures."""
