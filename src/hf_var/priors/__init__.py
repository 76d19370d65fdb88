# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the probability of codes."""

from .cache import VARCache
from .configuration_var import VARConfig
from .modeling_var import VARTransformer, VARTransformerOutput


__all__ = ["VARCache", "VARConfig", "VARTransformer", "VARTransformerOutput"]
