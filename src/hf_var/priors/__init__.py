# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the probability of codes."""

from .cache import VARCache
from .configuration_pixelcnn import PixelCNNConfig
from .configuration_pixelsnail import PixelSNAILConfig
from .configuration_rq import RQTransformerConfig
from .configuration_text_var import TextVARConfig
from .configuration_var import VARConfig
from .modeling_outputs import PixelPriorOutput, RQTransformerOutput
from .modeling_pixelcnn import PixelCNN
from .modeling_pixelsnail import PixelSNAIL
from .modeling_rq import RQTransformer
from .modeling_text_var import TextVARTransformer
from .modeling_var import VARTransformer, VARTransformerOutput
from .row_cache import RowCache
from .stacks import stack_codes, unstack_codes


__all__ = [
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
    "VARCache",
    "VARConfig",
    "VARTransformer",
    "VARTransformerOutput",
    "stack_codes",
    "unstack_codes",
]
