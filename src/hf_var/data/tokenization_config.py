# SPDX-License-Identifier: Apache-2.0
"""The arguments of a tokenization."""

from dataclasses import dataclass
from typing import Annotated

from ..ranges import NonNegativeInt, OneOf, PositiveInt, argument
from .config import AugmentConfig, ReadingConfig
from .engines import EngineConfig


AUGMENTATIONS = ("augment_rotation", "augment_translation", "augment_zoom", "augment_shear")


@dataclass(kw_only=True)
class TokenizationConfig(AugmentConfig, ReadingConfig, EngineConfig):
    """What [`~hf_var.data.tokenization.tokenize_dataset`] reads and writes."""

    data: str = argument(help="Hub data set, folder of images in class folders, or glob of parquet or tar files")
    vqvae: str = argument(help="folder or repository of the tokenizer")
    output_dir: str = argument(help="folder for the files of codes")

    # Data
    split: str | None = argument(None, help="default: train, or the only split")
    num_labels: NonNegativeInt | None = argument(None, help="0: leave labels out; default: as many as the data names")

    # Crops
    num_crops: PositiveInt = argument(1, help="crops of each image at random places; 1: the centre")
    horizontal_flip: bool = argument(False, help="add the mirror image of every crop")
    seed: NonNegativeInt = argument(0, help="seed of the random crops")

    # Run
    rows_per_shard: PositiveInt = argument(
        10_000, help="images that become one file; of a stream, those of one of its shards do"
    )
    caption_column: str | None = argument(
        None, help="column of texts that become embeddings beside the codes, in place of labels"
    )
    text_encoder: str | None = argument(None, help="folder or repository of the CLIPTextModel that embeds them")
    text_encoder_2: str | None = argument(None, help="a second one, whose pooled vector is stored")
    max_caption_length: PositiveInt | None = argument(None, help="tokens of a text; default: as many as it reads")
    batch_size: PositiveInt = argument(64, help="crops per process and forward pass")
    mixed_precision: Annotated[str, OneOf("no", "fp16", "bf16")] = argument(
        "no", help="no, fp16 or bf16; half precision is faster and changes some of the codes"
    )
    push_to_hub: bool = argument(False, help="upload the result as a data set")
    hub_dataset_id: str | None = argument(None, help="default: the name of output_dir")
    license: str | None = argument(None, help="licence of the images, for the data set card")

    def __post_init__(self):
        super().__post_init__()
        for name in ("text_encoder", "text_encoder_2", "max_caption_length"):
            if self.caption_column is None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` = {getattr(self, name)!r} needs a `caption_column`.")
        if self.caption_column is not None and (self.label_column is not None or self.num_labels):
            raise ValueError(f"`label_column` and `caption_column` = {self.caption_column!r} exclude each other.")
        for name in AUGMENTATIONS:
            if getattr(self, name) != 0 and self.num_crops == 1:
                raise ValueError(
                    f"`{name}` = {getattr(self, name)} changes random crops: `num_crops` must be above 1."
                )
        if self.engine == "ray" and self.dataloader_num_workers != 0:
            raise ValueError(
                f"`dataloader_num_workers` must be 0 for `engine` = 'ray', which reads with all CPUs of its cluster, got "
                f"{self.dataloader_num_workers}."
            )

    @property
    def rows_per_image(self) -> int:
        """Rows of codes that one image gives."""
        return 2 * self.num_crops if self.horizontal_flip else self.num_crops
