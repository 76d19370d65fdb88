# SPDX-License-Identifier: Apache-2.0
"""How much a call computes: things that are computed once must not come back with the next change."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_var.priors.layers import AdaLN, AdaLNOffset
from pipelines.tiny import make_pipeline


class CountCalls:
    """Counts the forward calls of a module's parts, by the name of their class."""

    def __init__(self, module: torch.nn.Module):
        self.counts = Counter()
        for part in module.modules():
            part.register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.counts[type(module).__name__] += 1


class SeenOperations(TorchDispatchMode):
    """Notes the operations and the shapes of their results."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        self.operations.append((str(func), tuple(getattr(first, "shape", ()))))
        return result

    def shapes(self, *names: str) -> list[tuple[int, ...]]:
        """Shapes of the results of all operations whose name begins with one of `names`."""
        return [shape for name, shape in self.operations if name.startswith(names)]


@pytest.mark.parametrize("shared_adaln", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_calls_of_every_part(shared_adaln, guidance_scale):
    pipe = make_pipeline(patch_nums=(1, 2, 3, 4), transformer={"shared_adaln": shared_adaln})
    counts = CountCalls(pipe.transformer).counts
    pipe([0, 1], guidance_scale=guidance_scale)
    assert counts["VARTransformer"] == 4
    assert counts["VARBlock"] == 2 * 4
    # The class alone decides on these: once per call, whatever the number of scales.
    projections = [part for part in pipe.transformer.modules() if isinstance(part, (AdaLN, AdaLNOffset))]
    assert counts["AdaLN"] + counts["AdaLNOffset"] == len(projections) == (4 if shared_adaln else 3)
    assert counts["Embedding"] == 1

    counts = CountCalls(pipe.vqvae).counts
    pipe([0, 1], guidance_scale=guidance_scale)
    assert counts["Decoder"] == 1
    assert counts["Codebook"] == counts["RefinementConv"] == 4
    assert counts["Encoder"] == 0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_cache_is_allocated_once_at_its_full_length(pipe, guidance_scale):
    with SeenOperations() as seen:
        pipe([0, 1, 2], guidance_scale=guidance_scale)
    rows = 3 if guidance_scale == 1 else 6
    # Two layers, keys and values, two heads of 16 channels, 21 tokens.
    buffers = [shape for shape in seen.shapes("aten.empty", "aten.new_empty") if shape[1:] == (2, 21, 16)]
    assert buffers == [(rows, 2, 21, 16)] * 4
    # Nothing grows by concatenation, and one block alone needs no mask.
    assert not [shape for shape in seen.shapes("aten.cat") if len(shape) == 4]
    assert not [shape for shape in seen.shapes("aten.where", "aten.masked_fill") if len(shape) == 4]


def test_only_the_survivors_of_top_k_are_sorted():
    pipe = make_pipeline(codebook_size=1000)
    with SeenOperations() as seen:
        pipe([0, 1], top_k=50)
    assert seen.shapes("aten.topk") == [(2, length, 50) for length in (1, 4, 16)]
    assert seen.shapes("aten.sort", "aten.argsort", "aten.kthvalue") == []


def test_one_draw_per_scale(pipe):
    with SeenOperations() as seen:
        pipe([0, 1])
    assert seen.shapes("aten.exponential") == [(2, length, 32) for length in (1, 4, 16)]
    # It looks whether its input is one of probabilities, for which the host waits for an accelerator.
    assert seen.shapes("aten.multinomial") == []


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_the_transformer_is_computed_once_for_both_halves_and_every_token_once(guidance_scale):
    pipe = make_pipeline(patch_nums=(1, 2, 3, 4))
    seen = []
    pipe.transformer.head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    pipe([0, 1], guidance_scale=guidance_scale)
    rows = 2 if guidance_scale == 1 else 4
    assert seen == [(rows, length, 32) for length in (1, 4, 9, 16)]


def test_logits_are_searched_but_once_per_scale(pipe):
    """Every pass over `(batch, length, codebook_size)` counts: more than half of an image's tokens are in the last scale."""
    with SeenOperations() as seen:
        pipe([0, 1], top_k=20)
    whole = (2, 16, 32)
    assert seen.shapes("aten.cumsum").count(whole) == 1
    assert seen.shapes("aten._softmax").count(whole) == 1
    assert seen.shapes("aten.flip") == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1.0},
        {"guidance_scale": lambda k, num_scales: 3.0 if k < 1 else 1.0},
        {"smooth": True},
        {"top_k": 5, "top_p": 0.0},
        {"generator": torch.Generator()},
        {"generator": [torch.Generator(), torch.Generator()]},
    ],
    ids=["guided", "unguided", "guided at first", "smooth", "top-k", "generator", "generators"],
)
def test_the_host_waits_for_no_result(settings):
    """On the meta device nothing has a value, so that whatever asks for one fails: `item`, `if tensor`, `nonzero`."""
    pipe = make_pipeline().to("meta")
    output = pipe([0, 1], output_type="pt", **settings)
    assert output.codes.shape == (2, 21)
    assert output.images.shape == (2, 3, 8, 8)
    assert output.codes.device.type == output.images.device.type == "meta"


def test_latents_alone_are_not_decoded(pipe):
    counts = CountCalls(pipe.vqvae).counts
    pipe([0, 1], output_type="latent")
    assert counts["Decoder"] == 0
    assert counts["Codebook"] == 3
