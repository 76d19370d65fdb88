# SPDX-License-Identifier: Apache-2.0
"""What the training of a transformer leaves on the Hub, at its end and on the way."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hub_server import HubServer, Request, Response


CLIENTS = Path(__file__).parent / "clients"

CHECK = f"""
import sys
sys.path.insert(0, {str(CLIENTS)!r})
from common import assert_draws
from huggingface_hub import ModelCard
assert_draws(pipe, sys.argv[1])
assert len(images) == 3 and Image.open("sample.png").size == (8, 8)
card = ModelCard.load("user/model").data
assert card.library_name == "hf_var" and card.datasets == "user/birds"
values = {{result.metric_type: result.metric_value for result in card.eval_results}}
assert values == {{"loss": 4.25, "bits_per_token": 6.1319, "accuracy": 0.125}}, values
"""


class GatedHub(HubServer):
    """A Hub on which commits wait until somebody asks for the page `/open`; `/waiting` comes when one does."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = threading.Event()
        self.gave_up = False

    def answer(self, request: Request) -> Response:
        if request.path == "/open":
            self.gate.set()
            return Response()
        if request.path == "/waiting":
            return Response(status=200 if self.waiting.wait(60) else 500)
        if "/commit/" in request.path:
            self.waiting.set()
            self.gave_up |= not self.gate.wait(120)
        return super().answer(request)


@pytest.fixture(scope="module")
def hub() -> Iterator[GatedHub]:
    with GatedHub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(run_in_hub_process, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of the result, and what the client printed."""
    folder = tmp_path_factory.mktemp("somebodys_home") / "model"
    return folder, run_in_hub_process(CLIENTS / "push_pipeline_result.py", folder).splitlines()


def test_pipeline_without_checkpoints_is_uploaded(hub, pushed):
    folder, addresses = pushed
    assert addresses == [f"{hub.url}/user/model"] * 2
    files = hub.files("user/model")
    models = {f"{model}/{name}" for model in ("transformer", "vqvae") for name in ("config.json", "model.safetensors")}
    texts = {"README.md", "model_index.json", "train_log.jsonl"}
    models.add("lora/adapter_model.safetensors")
    gallery = {f"images/example_{number}.png" for number in range(3)}
    assert files.keys() == {".gitattributes", "samples.png", "curves [1].png"} | models | texts | gallery
    widget = ModelCard(files["README.md"].decode()).data.widget
    assert [entry["text"] for entry in widget] == ["cat", "dog", "owl"]
    assert {entry["output"]["url"] for entry in widget} == gallery
    assert (folder / "checkpoints" / "step-00000001" / "model.safetensors").exists()
    for path in texts | {"transformer/config.json", "vqvae/config.json"}:
        assert "somebodys_home" not in files[path].decode(), path
    card = files["README.md"].decode()
    assert "](samples.png)" in card
    assert "](curves%20%5B1%5D.png)" in card
    assert "library_name: diffusers" not in card


def test_example_of_the_card_runs_as_it_stands(hub, pushed, run_in_hub_process, tmp_path):
    folder, _ = pushed
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.files("user/model")["README.md"].decode(), re.DOTALL)
    assert 'from_pretrained("user/model")' in snippet
    assert "class_labels=['cat', 'dog', 'owl']" in snippet
    in_folder = f"import os\nfrom PIL import Image\nos.chdir({str(tmp_path)!r})\n"
    run_in_hub_process(in_folder + snippet + CHECK, folder.with_name("expected.npz"), token=None)


def test_training_goes_on_while_it_uploads(hub, run_in_hub_process, tmp_path):
    hub.gate.clear()
    run_in_hub_process(CLIENTS / "push_in_background.py", "train", tmp_path / "background")
    commits = [commit.title for commit in hub.repositories["models", "user/background"].resolve("main").history]
    assert commits[:2] == ["Step 3", "Step 1"]
    assert not hub.gave_up
    assert {"model_index.json", "note.txt"} <= hub.files("user/background").keys()


def test_a_training_that_stops_does_not_wait_for_its_upload(hub, run_in_hub_process, tmp_path):
    hub.gate.clear()
    hub.waiting.clear()
    try:
        with pytest.raises(RuntimeError, match="exited with 5"):
            run_in_hub_process(CLIENTS / "push_in_background.py", "stop", tmp_path / "stopped")
        assert not hub.gave_up
    finally:
        hub.gate.set()
