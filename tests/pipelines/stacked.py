# SPDX-License-Identifier: Apache-2.0
"""Pipelines of RQ-Transformers and raster VARs small enough to sample in milliseconds."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_var import ARPipeline
from pipelines.tiny import make_transformer, make_vqvae
from priors.rq import SIZES, rq_model


WORDS = ["[PAD]", "[UNK]", "a", "thin", "three"]


def make_tokenizer(
    patch_nums, codebook_size=SIZES["codebook_size"], latent_channels=SIZES["latent_channels"], **fields
):
    """A tokenizer of equal maps, which halves the images."""
    sizes = {"codebook_size": codebook_size, "latent_channels": latent_channels, "in_channels": 1}
    return make_vqvae(patch_nums=patch_nums, refinement_ratio=0.0, **{**sizes, **fields})


def make_stacked(kind="classes", components=None, defaults=None, **fields):
    """A pipeline of an RQ-Transformer, `kind` of those of the model's tests."""
    prior = rq_model(kind, **fields)
    vqvae = make_tokenizer(prior.config.patch_nums)
    pipe = ARPipeline(vqvae, prior, **(components or {}), **(defaults or {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_raster(patch_nums=(4,), **fields):
    """A pipeline of a VAR transformer of raster order."""
    length = sum(side * side for side in patch_nums)
    prior = make_transformer(patch_nums=patch_nums, block_sizes=[1] * length, **fields)
    pipe = ARPipeline(make_vqvae(patch_nums=patch_nums), prior)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_text_tokenizer():
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")


def text_pipeline(kind="text", **defaults):
    return make_stacked(kind, {"tokenizer": make_text_tokenizer()}, defaults)


def image_pipeline(**fields):
    """A GPT whose condition is another image: as many codes before it, of a tokenizer that reads colours."""
    condition_vqvae = make_tokenizer([(2, 3)], in_channels=3)
    return make_stacked("prefix_gpt", {"condition_vqvae": condition_vqvae}, **fields)


def naive_codes(pipe, condition, seed, weight=1.0, top_k=0, nothing=None):
    """Stacks `(batch, positions, depth)` by the whole model again for every code, without a cache."""
    prior, source = pipe.prior, torch.Generator().manual_seed(seed)
    config, batch_size = prior.config, len(next(iter(condition.values())))
    stacks = torch.zeros(batch_size, config.num_positions, config.depth, dtype=torch.long)
    for position in range(config.num_positions):
        for depth in range(config.depth):
            vectors = config.code_inputs == "vectors"
            read = {"code_vectors": pipe.vqvae.code_vectors(stacks)} if vectors else {"codes": stacks}
            with torch.no_grad():
                logits = prior(**condition, **read).logits[:, position, depth]
                if weight != 1:
                    logits = weight * logits + (1 - weight) * prior(**nothing, **read).logits[:, position, depth]
            if top_k:
                logits = logits.where(logits >= logits.topk(top_k).values[:, -1:], -torch.inf)
            stacks[:, position, depth] = torch.multinomial(logits.softmax(-1), 1, generator=source)[:, 0]
    return stacks
