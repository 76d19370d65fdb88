# SPDX-License-Identifier: Apache-2.0
"""Repositories and uploads, at the end of a training and during it."""

import glob
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from transformers.utils import logging

from ..files import UNFINISHED, remove_unfinished
from ..ranges import CheckedFields, NonNegativeInt, argument


logger = logging.get_logger(__name__)

# What makes a result: a model, or the two of a pipeline and an adapter, and what tells of it. All other folders stay here,
# such as checkpoints and the trackers' logs.
MODELS = ("transformer", "prior", "middle_prior", "bottom_prior", "vqvae", "condition_vqvae", "lora")
MODELS += ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
RESULT_FILES = ["README.md", "*.json", "*.safetensors", "train_log.jsonl", "*.png", "images/*.png"]
RESULT_FILES += [f"{model}/*.{kind}" for model in (*MODELS, *TOKENIZERS) for kind in ("json", "safetensors")]
# Vocabularies of the tokenizers that have no single file.
RESULT_FILES += [f"{tokenizer}/*.{kind}" for tokenizer in TOKENIZERS for kind in ("txt", "model", "jinja")]
PREFIX = "push-"


@dataclass(kw_only=True)
class HubConfig(CheckedFields):
    """The repository of a result, and its licence."""

    push_to_hub: bool = argument(False, help="upload the result")
    hub_model_id: str | None = argument(None, help="default: the name of output_dir")
    license: str | None = argument(None, help="licence of the weights, for the model card")


@dataclass(kw_only=True)
class PipelineHubConfig(HubConfig):
    """The same for a pipeline, which may be uploaded while it is trained."""

    push_steps: NonNegativeInt = argument(
        0, help="upload the pipeline this often, in the background; 0: at the end only"
    )
    data_license: str | None = argument(None, help="licence of the data, for the model card")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_steps > 0 and not self.push_to_hub:
            raise ValueError(f"`push_steps` = {self.push_steps} needs `push_to_hub`.")


def create_repository(output_dir: str | Path, repo_id: str | None = None, private: bool | None = None) -> str:
    """Make sure that a repository exists and may be written to, and return its name with the namespace."""
    return HfApi().create_repo(repo_id or Path(output_dir).resolve().name, exist_ok=True, private=private).repo_id


def push_card(card: RepoCard, repo_id: str, message: str, repo_type: str = "model") -> str:
    """
    Upload a card as `README.md`, and return the address of the commit. Before huggingface_hub 2.0, `card.push_to_hub`
    has the public Hub validate it, whatever `HF_ENDPOINT` says.
    """
    content = str(card).encode()
    commit = HfApi().upload_file(
        path_or_fileobj=content, path_in_repo="README.md", repo_id=repo_id, repo_type=repo_type, commit_message=message
    )
    return str(commit)


def push_result(
    output_dir: str | Path,
    repo_id: str | None = None,
    message: str = "Upload the result of a training",
    private: bool | None = None,
) -> str:
    """
    Upload a model or a pipeline, its card, pictures and `train_log.jsonl`, to a repository that is `private` if it is
    new; returns its address.
    """
    # Names rather than patterns: the client's `*` matches slashes, and would find the weights in checkpoints, too.
    files = [path for pattern in RESULT_FILES for path in Path(output_dir).glob(pattern)]
    commit = HfApi().upload_folder(
        repo_id=create_repository(output_dir, repo_id, private),
        folder_path=output_dir,
        allow_patterns=[glob.escape(path.relative_to(output_dir).as_posix()) for path in files],
        commit_message=message,
    )
    return str(commit.repo_url)


class BackgroundPush:
    """
    Uploads intermediate results of a training in the background, one at a time, to a repository that exists. Not by
    `HfApi.run_as_future`: a program that is stopped would wait for the threads of its pool.
    """

    def __init__(self, repo_id: str, output_dir: str | Path):
        self.repo_id = repo_id
        self.output_dir = Path(output_dir)
        self._thread: threading.Thread | None = None
        remove_unfinished(output_dir, PREFIX)

    @property
    def is_free(self) -> bool:
        """Whether no upload is under way."""
        return self._thread is None or not self._thread.is_alive()

    def push(self, save: Callable[[Path], None], message: str) -> bool:
        """Begin to upload what `save` writes, unless an upload is under way; returns whether it began."""
        if not self.is_free:
            return False
        self.output_dir.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{PREFIX}", dir=self.output_dir))
        save(folder)
        # A commit is made as a whole or not at all.
        self._thread = threading.Thread(target=self._upload, args=(folder, message), daemon=True)
        self._thread.start()
        return True

    def finish(self) -> None:
        """Wait for the upload that is under way, if any."""
        if self._thread is not None:
            self._thread.join()

    def _upload(self, folder: Path, message: str) -> None:
        try:
            HfApi().upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message)
        # Any error only warns: a failed upload must not stop the training.
        except Exception as error:
            logger.warning(f"The upload {message!r} to {self.repo_id} failed, the training continues: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
