# SPDX-License-Identifier: Apache-2.0
"""What the convolutional priors share: the call, the class and checks of both."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from ..loading import CheckedModelMixin
from .configuration_pixel_prior import PixelPriorConfig
from .modeling_outputs import PixelPriorOutput
from .row_cache import RowCache


class PixelPrior(CheckedModelMixin, PreTrainedModel):
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
        begin = 0 if cache is None else cache.num_rows
        rows = self._check_codes(codes, labels, cache).unflatten(1, (-1, self.config.width))
        _check_batch(cache, codes=codes, class_labels=class_labels, condition_codes=condition_codes, labels=labels)
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

    def _check_codes(self, codes: torch.Tensor, labels: torch.Tensor | None, cache: RowCache | None) -> torch.Tensor:
        config = self.config
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
        check_range("codes", codes, config.codebook_size)
        if labels is not None and labels.shape != codes.shape:
            raise ValueError(
                f"`labels` must have the shape of `codes`, {tuple(codes.shape)}, got {tuple(labels.shape)}."
            )
        return codes

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
        if is_readable(class_labels):
            smallest, largest = int(class_labels.min()), int(class_labels.max())
            if smallest < 0 or largest > num_labels - needs_class:
                others = (
                    " without an unconditional class" if needs_class else f", or -1 or {num_labels} for unconditional"
                )
                raise ValueError(f"`class_labels` must be in [0, {num_labels}){others}, got {class_labels.tolist()}.")
        if num_labels == 0:
            return None
        if self.training and config.class_dropout_prob > 0:
            # Classifier-free guidance needs the unconditional class, too (Ho and Salimans 2022).
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < config.class_dropout_prob
            class_labels = torch.where(dropped, num_labels, class_labels)
        return class_labels


def is_readable(values: torch.Tensor) -> bool:
    """Whether values can be checked: elsewhere than on the CPU the comparison would wait for the device."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and values.numel() > 0


def check_range(name: str, codes: torch.Tensor, codebook_size: int) -> None:
    """Raise a `ValueError` unless the codes are integers in range."""
    if codes.dtype != torch.int64:
        raise ValueError(f"`{name}` must be of type torch.int64, got {codes.dtype}.")
    if is_readable(codes) and (int(codes.min()) < 0 or int(codes.max()) >= codebook_size):
        raise ValueError(
            f"`{name}` must be in [0, {codebook_size}), got values from {int(codes.min())} to {int(codes.max())}."
        )


def _check_batch(cache: RowCache | None, **inputs: torch.Tensor | None) -> None:
    sizes = {name: len(tensor) for name, tensor in inputs.items() if tensor is not None and tensor.ndim > 0}
    if cache is not None and cache.batch_size > 0:
        sizes["cache"] = cache.batch_size
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All arguments must have the same batch size, got {sizes}.")
