# SPDX-License-Identifier: Apache-2.0
"""diffusers' words for attention implementations, by which servers set them."""

from typing import Any


# Of diffusers' words those that one of transformers' implementations answers to.
ATTENTION_BACKENDS = {
    "native": "sdpa",
    "_native_math": "eager",
    "flex": "flex_attention",
    "flash": "flash_attention_2",
    "_flash_3": "flash_attention_3",
}


class AttentionBackendMixin:
    """Models whose attention is set as that of diffusers' own, beside transformers' `set_attn_implementation`."""

    def set_attention_backend(self, backend: str) -> None:
        r"""
        Set the attention implementation by the name that diffusers' `ModelMixin.set_attention_backend` has for it. Models
        without a choice (tokenizers, and priors of convolutions) accept the names and compute as before.

        Args:
            backend (`str`):
                `"native"` for torch's attention, `"_native_math"` for two matrix products (`eager`), `"flex"` for
                FlexAttention, `"flash"` and `"_flash_3"` for FlashAttention 2 and 3.

        Raises:
            `ValueError`: If the name is another one.
            `ImportError`: If the implementation is not installed.
        """
        name = backend.lower() if isinstance(backend, str) else backend
        if not isinstance(name, str) or name not in ATTENTION_BACKENDS:
            raise ValueError(f"`backend` must be one of {', '.join(map(repr, ATTENTION_BACKENDS))}, got {backend!r}.")
        self._set_implementation(ATTENTION_BACKENDS[name])

    def reset_attention_backend(self) -> None:
        """Set the attention implementation that a new model has."""
        self._set_implementation(ATTENTION_BACKENDS["native"])

    def _set_implementation(self, name: str) -> None:
        model: Any = self
        if model._supports_attention_backend:
            model.set_attn_implementation(name)
