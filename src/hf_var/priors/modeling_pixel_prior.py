# SPDX-License-Identifier: Apache-2.0
"""What the convolutional priors share: the call, the class and checks of both."""

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from ..attention_backends import AttentionBackendMixin
from ..loading import CheckedModelMixin
from ..tensor_checks import as_indices, check_batch, check_range, describe
from .checks import as_targets
from .configuration_pixel_prior import PixelPriorConfig
from .modeling_outputs import PixelPriorOutput
from .row_cache import RowCache


class PixelPrior(CheckedModelMixin, AttentionBackendMixin, PreTrainedModel):
    """
    A prior of one map of codes, `p(code | codes before it in raster order, condition)`. Subclasses say what their
    condition is (`embed_condition`) and compute the logits (`predict`).
    """

    config: PixelPriorConfig
    main_input_name = "codes"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache"]
    _can_compile_fullgraph = True

    @can_return_tuple
    def forward(
        self,
        codes: torch.LongTensor,
        class_labels: torch.LongTensor | None = None,
        condition_codes: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        cache: RowCache | None = None,
    ) -> PixelPriorOutput:
        r"""
        Logits of the codes that are given, each from those before it: nothing is shifted by the caller.

        Args:
            codes (`torch.LongTensor` of shape `(batch, n)`):
                Codes of whole rows in raster order, from the top of the map or after the finished rows of `cache`. A code
                has no influence on logits at or before its place, so what is not known yet may be anything.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Classes. -1, `config.num_labels` and `None` mean unconditional, which a model with classes knows only if
                it was trained with `class_dropout_prob` above 0; a model without classes accepts nothing else.
            condition_codes (`torch.LongTensor` of shape `(batch, config.condition_length)`, *optional*):
                Codes of the coarser map that the model is conditioned on, if it is.
            labels (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                The codes to predict, `codes` themselves, for the loss; -100 leaves a code out.
            cache ([`RowCache`], *optional*):
                The finished rows, in evaluation mode only. It keeps the condition of its first call; later calls ignore
                theirs.
            return_dict (`bool`, *optional*):
                Whether to return a [`PixelPriorOutput`] instead of a tuple.

        Raises:
            `ValueError`: If the codes are not whole rows of the map, arguments do not fit the model or each other, or a
                label or code is out of range.
        """
        codes, labels = self._check_codes(codes, labels, cache)
        given = {"class_labels": class_labels, "condition_codes": condition_codes}
        given = {name: None if value is None else as_indices(name, value) for name, value in given.items()}
        num_maps = -1 if cache is None else cache.batch_size
        check_batch(codes=codes, **given, labels=labels, cache=None if num_maps < 0 else num_maps)
        class_labels, condition_codes = given["class_labels"], given["condition_codes"]
        rows, begin = codes.unflatten(1, (-1, self.config.width)), 0 if cache is None else cache.num_rows
        condition = None if cache is None else cache.condition
        if condition is None:
            condition = self.embed_condition(self._resolve_labels(class_labels, codes), condition_codes)
        if cache is not None:
            cache.condition = condition
            cache.begin_rows(rows.shape[1])

        logits = self.predict(rows, condition, begin, cache)  # (batch, codebook_size, rows, width)
        logits = logits.flatten(2).transpose(1, 2).float()
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return PixelPriorOutput(loss=loss, logits=logits)

    def embed_condition(
        self, class_labels: torch.Tensor | None, condition_codes: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What is the same for all rows: from resolved labels, `None` without classes, and the coarser codes."""
        raise NotImplementedError

    def predict(
        self, rows: torch.Tensor, condition: torch.Tensor | None, begin: int, cache: RowCache | None = None
    ) -> torch.Tensor:
        """Logits `(batch, codebook_size, rows, width)` of `rows` of codes `(batch, rows, width)` from row `begin` on."""
        raise NotImplementedError

    def _check_codes(
        self, codes: torch.Tensor, labels: torch.Tensor | None, cache: RowCache | None
    ) -> tuple[Any, Any]:
        """Both in int64."""
        config, codes = self.config, as_indices("codes", codes)
        if not isinstance(cache, RowCache | None):
            raise ValueError(f"`cache` must be a `RowCache`, got {describe(cache)}.")
        if cache is not None and self.training:
            raise ValueError(
                "`cache` must be None in training mode, where all rows are computed at once: call `eval()`."
            )
        left = config.height - (0 if cache is None else cache.num_rows)
        if left == 0:
            raise ValueError(f"`cache` is full: it holds all {config.height} rows. Pass a new one or `reset()` it.")
        if (
            codes.ndim != 2
            or codes.shape[1] == 0
            or codes.shape[1] % config.width
            or codes.shape[1] > left * config.width
        ):
            raise ValueError(
                f"`codes` must have the shape (batch, n) with 1 to {left} whole rows of {config.width} codes for "
                f"map_size={config.map_size}, got {tuple(codes.shape)}."
            )
        check_range("codes", codes, 0, config.codebook_size - 1, f"in [0, {config.codebook_size})")
        return codes, None if labels is None else as_targets(labels, tuple(codes.shape[1:]), config.codebook_size)

    def _resolve_labels(self, class_labels: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor | None:
        """Rows of the class embedding `(batch,)`, some of them dropped in training; `None` without classes."""
        config, num_labels = self.config, self.config.num_labels or 0
        needs_class = num_labels > 0 and not config.has_unconditional_class
        if class_labels is None and not needs_class:
            class_labels = torch.full(codes.shape[:1], num_labels, device=codes.device)
        elif class_labels is None or class_labels.ndim != 1:
            found = None if class_labels is None else tuple(class_labels.shape)
            raise ValueError(f"`class_labels` must have the shape (batch,) for {num_labels} classes, got {found}.")
        class_labels = torch.where(class_labels == -1, num_labels, class_labels)
        accepted = f"in [0, {num_labels})"
        accepted += " without an unconditional class" if needs_class else f", or -1 or {num_labels} for unconditional"
        check_range("class_labels", class_labels, 0, num_labels - needs_class, accepted)
        if num_labels == 0:
            return None
        if self.training and config.class_dropout_prob > 0:
            # Classifier-free guidance needs the unconditional class, too (Ho and Salimans 2022).
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < config.class_dropout_prob
            class_labels = torch.where(dropped, num_labels, class_labels)
        return class_labels
