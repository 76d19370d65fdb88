# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the probability of codes."""

from .cache import VARCache
from .cache_budget import CacheBudget
from .configuration_pixelcnn import PixelCNNConfig
from .configuration_pixelsnail import PixelSNAILConfig
from .configuration_rq import RQTransformerConfig
from .configuration_text_var import TextVARConfig
from .configuration_var import VARConfig
from .layer_hooks import LayerCall, LayerHook
from .modeling_outputs import PixelPriorOutput, RQTransformerOutput
from .modeling_pixelcnn import PixelCNN
from .modeling_pixelsnail import PixelSNAIL
from .modeling_rq import RQTransformer
from .modeling_text_var import TextVARTransformer
from .modeling_var import VARTransformer, VARTransformerOutput
from .row_cache import RowCache
from .stacks import stack_codes, unstack_codes
from .token_pruning import TokenPruning


__all__ = [
    "CacheBudget",
    "LayerCall",
    "LayerHook",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelPriorOutput",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "RQTransformer",
    "RQTransformerConfig",
    "RQTransformerOutput",
    "RowCache",
    "TextVARConfig",
    "TextVARTransformer",
    "TokenPruning",
    "VARCache",
    "VARConfig",
    "VARTransformer",
    "VARTransformerOutput",
    "stack_codes",
    "unstack_codes",
]
