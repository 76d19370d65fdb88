# SPDX-License-Identifier: Apache-2.0
"""Exact likelihoods of images' codes, and classification by Bayes' rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput

from .pipelines.base import PipelineBase
from .pipelines.checks import as_tensor, checked_codes
from .pipelines.condition_inputs import as_texts
from .pipelines.conditions import Condition, Labels
from .pipelines.images import image_pixels
from .pipelines.options import check_names
from .ranges import PositiveInt, checked


@dataclass
class LogLikelihood:
    """
    Log-likelihoods in nats, in fp32, see [`log_likelihood`].

    Args:
        total (`torch.FloatTensor` of shape `(batch,)`): log p(codes | class) of each image.
        per_scale (`torch.FloatTensor` of shape `(batch, scales)`):
            The part of each scale, log p(its codes | coarser codes, class); they add up to `total`.
        per_token (`torch.FloatTensor` of shape `(batch, length)`):
            The part of each token. The tokens of a scale are independent given the coarser scales.
        codes (`torch.LongTensor` of shape `(batch, length)`): What was scored.
    """

    total: torch.Tensor
    per_scale: torch.Tensor
    per_token: torch.Tensor
    codes: torch.Tensor


@dataclass
class Classification:
    """
    What an image shows according to a generative model, see [`classify`].

    Args:
        posterior (`torch.FloatTensor` of shape `(batch, num_labels)`): p(class | codes); each row adds up to 1.
        log_likelihood (`torch.FloatTensor` of shape `(batch, num_labels)`):
            log p(codes | class) in nats; NaN for classes of prior 0, which are not computed.
        label_ids (`torch.LongTensor` of shape `(batch,)`):
            The most probable class of each image, or the index of its most probable text.
        label_names (`list[str]`): Its name, or the text.
    """

    posterior: torch.Tensor
    log_likelihood: torch.Tensor
    label_ids: torch.Tensor
    label_names: list[str]


class ScoredConditions(TypedDict, total=False):
    """What images are scored under in place of classes; each kind of pipeline knows some, see [`log_likelihood`]."""

    class_embeds: torch.Tensor | None
    prompt: str | Sequence[str] | None
    prompt_embeds: torch.Tensor | None
    pooled_prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    original_size: tuple[int, int] | Sequence[tuple[int, int]] | None
    condition_image: PipelineImageInput | None
    condition_codes: torch.Tensor | None


def log_likelihood(
    pipe: PipelineBase,
    images: PipelineImageInput | None = None,
    class_labels: Labels = None,
    codes: torch.Tensor | None = None,
    batch_size: int = 32,
    **condition: Unpack[ScoredConditions],
) -> LogLikelihood:
    r"""
    The exact log-likelihood of images' codes under the model. It is the sum over the tokens of the log-probabilities
    that the prior gives them when it reads the images' own codes: those of the coarser scales (VAR, Tian et al. 2024,
    equation 2), or of all positions before (PixelCNN, van den Oord et al. 2016), all in one pass, in evaluation mode, without guidance or filters.

    It is the likelihood of the codes, not of the pixels: several images may have the same codes, and it ignores what the tokenizer
    loses. Models with different tokenizers cannot be compared by it.

    Args:
        pipe ([`VARPipeline`] or another of our pipelines): The two models.
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
            Images, as for [`~VARPipeline.encode_images`], which resizes what has another size than the model's. How
            likely an image is depends on how it was resized: do it before, as in the training.
        class_labels (`int`, `str`, `None`, `torch.Tensor` or a list of these, *optional*):
            Ids or names, one for each image or one for all; `None` and -1 are unconditional.
        codes (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            In place of `images`, such as a pipeline's call returns.
        batch_size (`int`, *optional*, defaults to 32): Images that the models see at once.
        prompt (`str` or `list[str]`, *optional*):
            Texts, of a pipeline that reads them, such as [`VARTextToImagePipeline`], or names or ids of classes; here and
            below one for each image or one for all. The empty text is what guidance leads away from.
        prompt_embeds (`torch.FloatTensor`, *optional*):
            In place of `prompt`, with `pooled_prompt_embeds` and `prompt_attention_mask`, as
            [`~VARTextToImagePipeline.encode_prompt`] returns them.
        original_size (`tuple[int, int]`, *optional*): As for a call of [`VARTextToImagePipeline`].
        class_embeds (`torch.FloatTensor` of shape `(batch, condition_size)`, *optional*):
            Embeddings in place of `class_labels`, as for a call of [`VARPipeline`].
        condition_image (images, *optional*): Conditions of an [`ARPipeline`] with a `condition_vqvae`.
        condition_codes (`torch.LongTensor`, *optional*): Their tokens, as for a call of [`ARPipeline`].

    Returns:
        [`LogLikelihood`], on the pipeline's device.

    Raises:
        `ValueError`: If not exactly one of `images` and `codes` is given, or an argument has the wrong size or is out
            of range.
        `TypeError`: If the pipeline is not conditioned on what is passed.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import DIGITS_CHECKPOINT, VARPipeline
    >>> from hf_var.scoring import log_likelihood

    >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    >>> images = pipe(class_labels=[3, 3], generator=torch.Generator().manual_seed(0)).images
    >>> as_three, as_eight = log_likelihood(pipe, images, 3), log_likelihood(pipe, images, 8)
    >>> bool((as_three.total > as_eight.total).all())
    True
    >>> as_three.per_scale.shape
    torch.Size([2, 5])
    ```
    """
    _check_pipeline(pipe)
    batch_size = checked("batch_size", batch_size, PositiveInt)
    given = _given(pipe, "log_likelihood", condition)
    codes = _codes(pipe, images, codes, batch_size)
    scored = pipe._scored_condition(class_labels, given)
    if len(scored) not in (1, len(codes)):
        one = "label" if scored.name == "class_labels" else "condition"
        raise ValueError(f"`{scored.name}` must be one {one} or {len(codes)}, one per image, got {len(scored)}.")
    chosen = torch.arange(len(scored)).expand(len(codes)).unsqueeze(1)  # (batch, 1)
    per_token = _score(pipe, codes, scored, chosen, batch_size)[:, 0]
    scales = per_token.split(pipe.vqvae.config.scale_lengths, dim=1)
    per_scale = torch.stack([scale.sum(dim=1) for scale in scales], dim=1)
    return LogLikelihood(per_scale.sum(dim=1), per_scale, per_token, codes)


def classify(
    pipe: PipelineBase,
    images: PipelineImageInput | None = None,
    codes: torch.Tensor | None = None,
    prior: Sequence[float] | np.ndarray | torch.Tensor | None = None,
    batch_size: int = 32,
    **condition: Unpack[ScoredConditions],
) -> Classification:
    r"""
    Classify images with a generative model by Bayes' rule: p(class | codes) is p(codes | class) p(class), divided by
    the sum over the classes. No training is needed. Li et al. (2023) do so with the bounds of diffusion models, Chen et
    al. (2025, A-VARC) with VAR, whose likelihood is exact; their smoothing, pruning of candidates and fine-tuning are
    not part of this.

    The transformer sees each image once for each class; the images are encoded once. A pipeline of texts chooses among
    those of `prompt`: which of these captions fits the image best.

    Args:
        pipe ([`VARPipeline`] or another of our pipelines): The two models.
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these, *optional*):
            As for [`log_likelihood`].
        codes (`torch.LongTensor` of shape `(batch, length)`, *optional*): In place of `images`.
        prior (`list[float]`, `np.ndarray` or `torch.Tensor` of shape `(num_labels,)`, *optional*, defaults to uniform):
            How probable each class is beforehand, up to a factor. A class of prior 0 is left out and costs nothing.
        batch_size (`int`, *optional*, defaults to 32): Pairs of an image and a class that the transformer sees at once.
        prompt (`list[str]`, *optional*):
            Texts to choose from in place of the classes; `prior` then has a number for each. Other conditions that
            [`log_likelihood`] knows serve as well.

    Returns:
        [`Classification`], on the pipeline's device.

    Raises:
        `ValueError`: If the model has no classes, not exactly one of `images` and `codes` is given, or an argument has
            the wrong size or is out of range.

    Example:

    ```python
    >>> import torch
    >>> from hf_var import DIGITS_CHECKPOINT, VARPipeline
    >>> from hf_var.scoring import classify

    >>> pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    >>> images = pipe(class_labels=[3, 1, 4], generator=torch.Generator().manual_seed(0)).images
    >>> classify(pipe, images).label_names
    ['3', '1', '4']
    ```
    """
    _check_pipeline(pipe)
    batch_size = checked("batch_size", batch_size, PositiveInt)
    given = _given(pipe, "classify", condition)
    scored, names = _candidates(pipe, given)
    log_prior = _log_prior(prior, len(scored))
    codes = _codes(pipe, images, codes, batch_size)
    candidates = log_prior.isfinite().nonzero()[:, 0]
    totals = _score(pipe, codes, scored, candidates.expand(len(codes), -1), batch_size, sum_tokens=True)
    candidates = candidates.to(totals.device)
    likelihood = totals.new_full((len(codes), len(scored)), torch.nan)
    likelihood[:, candidates] = totals
    posterior = torch.zeros_like(likelihood)
    posterior[:, candidates] = (totals + log_prior.to(totals)[candidates]).softmax(dim=1)
    label_ids = posterior.argmax(dim=1)
    return Classification(posterior, likelihood, label_ids, [names[label] for label in label_ids.tolist()])


@torch.no_grad()
def _score(
    pipe: PipelineBase,
    codes: torch.Tensor,
    condition: Condition,
    chosen: torch.Tensor,
    batch_size: int,
    sum_tokens: bool = False,
) -> torch.Tensor:
    """
    Log-probabilities of `(batch, length)` codes under the `(batch, candidates)` entries of the condition that are `chosen`:
    of shape `(batch, candidates, length)`, or `(batch, candidates)` if the tokens are summed up.
    """
    num_candidates, batch_size = chosen.shape[1], min(batch_size, chosen.numel())
    pieces = torch.arange(len(codes)).split(max(1, batch_size // num_candidates))
    found = []
    with pipe._at_work() as device, pipe.progress_bar(total=len(pieces)) as progress_bar:  # pyright: ignore
        for piece in pieces:
            scorer = pipe._scorer(codes[piece])
            for pairs in torch.arange(len(piece) * num_candidates).split(batch_size):
                entries = condition.select(chosen[piece].flatten()[pairs].tolist())
                per_token = scorer(pairs // num_candidates, entries.arguments(device, guided=False))  # (pairs, length)
                found.append(per_token.sum(dim=1) if sum_tokens else per_token)
            progress_bar.update()
    return torch.cat(found).unflatten(0, (len(codes), num_candidates))


@torch.no_grad()
def _encode(pipe: PipelineBase, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    with pipe._at_work():
        return torch.cat([pipe._encode(piece) for piece in pixel_values.split(min(batch_size, len(pixel_values)))])


def _check_pipeline(pipe: Any) -> None:
    if not isinstance(pipe, PipelineBase):
        raise ValueError(f"`pipe` must be a pipeline such as `VARPipeline`, got {type(pipe).__name__}.")


def _given(pipe: PipelineBase, function: str, condition: Mapping[str, Any]) -> dict[str, Any]:
    """What is given in place of classes; a `TypeError` if the pipeline does not know it."""
    check_names(function, condition, pipe.scored_conditions)
    return {name: value for name, value in condition.items() if value is not None}


def _candidates(pipe: PipelineBase, given: Mapping[str, Any]) -> tuple[Condition, list[str]]:
    """The classes to choose from, or what is given in their place, and their names."""
    if given:
        scored = pipe._scored_condition(None, given)
        texts = as_texts("prompt", given["prompt"]) if "prompt" in given else map(str, range(len(scored)))
        return scored, list(texts)
    names = list(pipe.id2label.values())
    if not names:
        others = " or ".join(f"`{name}`" for name in pipe.scored_conditions)
        raise ValueError(f"`pipe` must have a transformer of several classes, got num_labels=0: pass {others}.")
    return pipe._scored_condition(list(range(len(names))), given), names


def _codes(pipe: PipelineBase, images: Any, codes: Any, batch_size: int) -> torch.Tensor:
    """The codes to score, `(batch, length)`, on the pipeline's device."""
    if (images is None) == (codes is None):
        raise ValueError("Pass exactly one of `images` and `codes`.")
    if codes is None:
        pixel_values = image_pixels(images, pipe.vqvae.config, name="images")
        return _encode(pipe, pixel_values, batch_size)
    return checked_codes("codes", codes, pipe.vqvae.config).to(pipe._execution_device)


def _log_prior(prior: Any, num_labels: int) -> torch.Tensor:
    """Of each class, up to a constant, in fp32."""
    if prior is None:
        return torch.zeros(num_labels)
    weights = as_tensor(prior)
    valid = weights is not None and weights.shape == (num_labels,) and not weights.is_complex()
    weights = weights.cpu().double() if valid else torch.zeros(1)  # pyright: ignore
    if not bool((weights.isfinite() & (weights >= 0)).all()) or float(weights.sum()) <= 0:
        raise ValueError(
            f"`prior` must hold {num_labels} numbers of at least 0, one per label and not all 0, got {prior!r}."
        )
    return weights.log().float()


__all__ = ["Classification", "LogLikelihood", "classify", "log_likelihood"]
