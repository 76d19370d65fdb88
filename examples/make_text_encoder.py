# SPDX-License-Identifier: Apache-2.0
"""
Make a small text encoder for your captions, to be trained with a transformer (`--train_text_encoder true` of train_var.py).

    python examples/make_text_encoder.py data/emoji/train.parquet --caption_column caption --output outputs/text_encoder

It has a byte-pair vocabulary of the captions (Sennrich et al. 2016), so that every text can be read, and the weights of a
`CLIPTextModel` of transformers, which are random. The folder is what `--text_encoder` names.
"""

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from hf_var.data import caption_condition, load_source


BEGIN, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Byte pairs of words in lower case, between marks of the beginning and the end, as CLIP has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # The end must not be the third: transformers takes 2 for a mistake of early configurations and ignores it.
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in (BEGIN, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A {END}", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, model_max_length=length
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Hub data set, folder or glob of files")
    parser.add_argument("--caption_column", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the encoder and its tokenizer")
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens, with 256 bytes and three marks")
    parser.add_argument("--length", type=int, default=16, help="tokens of a text, with two marks")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=2)
    parser.add_argument("--num_attention_heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    dataset: Any = load_source("data", args.data, None, ["train"])
    # The checks of a training.
    caption_condition(dataset, args.caption_column, [], args.length)
    tokenizer = train_tokenizer(list(dataset[args.caption_column]), args.vocab_size, args.length)
    torch.manual_seed(args.seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=4 * args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=args.length,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
    )
    CLIPTextModel(config).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"wrote {args.output}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
