# SPDX-License-Identifier: Apache-2.0
"""The jobs of gpu_session.py, and the processes that they run in."""
