# SPDX-License-Identifier: Apache-2.0
"""How well pictures agree with their texts, by a CLIP (Radford et al. 2021), of any size and trained on anything."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel

from ..modes import evaluation_mode


BATCH_SIZE = 64


class TextAgreement:
    r"""
    Agreement of pictures and texts in the space of a CLIP.

    Args:
        model (`str` or `CLIPModel`): The CLIP, or its folder or repository.
        processor (`CLIPProcessor`, *optional*): What prepares pictures and texts for it, by default that of the folder.

    Raises:
        `ValueError`: If a model is passed without its processor, or the folder lacks weights of a `CLIPModel`.
    """

    def __init__(self, model: str | CLIPModel, processor: Any = None):
        if isinstance(model, str):
            # transformers would go on with random weights in place of those that are not there.
            loaded: Any = CLIPModel.from_pretrained(model, output_loading_info=True)
            found, report = loaded
            if report["missing_keys"]:
                missing = sorted(report["missing_keys"])[0]
                raise ValueError(f"`model` = {model!r} lacks weights of a CLIPModel, such as {missing}.")
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = found
        if processor is None:
            raise ValueError("`processor` must be passed with a model.")
        self.model: Any = model
        self.processor = processor

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> dict[str, float]:
        """
        Compare pictures with the texts that they were drawn of.

        Args:
            images (`list[PIL.Image.Image]`): The pictures.
            texts (`list[str]`): As many texts.

        Returns:
            `dict[str, float]`: `retrieval_accuracy`, the share of pictures that are nearer to their text than to all
            other ones that differ from it, and `clip_score` (Hessel et al. 2021), the mean cosine in percent, at
            least 0.

        Raises:
            `ValueError`: If there are not as many texts as pictures, or fewer than two different texts.
        """
        if len(images) != len(texts):
            raise ValueError(f"`texts` must be as many as `images`, {len(images)}, got {len(texts)}.")
        different = list(dict.fromkeys(texts))
        if len(different) < 2:
            raise ValueError(f"`texts` must have two different ones at least, got {different}.")
        image_embeds, text_embeds = self._embed(images, different)
        cosines = image_embeds @ text_embeds.T  # (images, texts)
        own = torch.tensor([different.index(text) for text in texts])
        scores = 100 * cosines[torch.arange(len(own)), own]
        return {
            "retrieval_accuracy": (cosines.argmax(dim=1) == own).float().mean().item(),
            "clip_score": scores.clamp(min=0).mean().item(),
        }

    def _embed(self, images: Sequence[Image.Image], texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions of pictures and of texts, `(number, width)`."""
        found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        with evaluation_mode(self.model):
            most = max(len(images), len(texts))
            for first in range(0, most, BATCH_SIZE):
                # Both go through the model together; the shorter list ends with its last element again.
                piece = range(first, min(first + BATCH_SIZE, most))
                inputs = self.processor(
                    images=[images[min(number, len(images) - 1)].convert("RGB") for number in piece],
                    text=[texts[min(number, len(texts) - 1)] for number in piece],
                    padding=True,
                    truncation=True,
                    return_tensors="pt",
                ).to(self.model.device)
                output = self.model(**inputs)
                found[0].append(output.image_embeds.float().cpu())
                found[1].append(output.text_embeds.float().cpu())
        return torch.cat(found[0])[: len(images)], torch.cat(found[1])[: len(texts)]


__all__ = ["TextAgreement"]
