# SPDX-License-Identifier: Apache-2.0
"""What the race of race.py is made of."""
