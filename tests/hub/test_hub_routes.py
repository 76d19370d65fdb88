# SPDX-License-Identifier: Apache-2.0
"""
Publishing and loading over HTTP, each client a process of its own: the scripts in `clients/` hold the assertions.
Pipelines that only load from folders are not enough, as diffusers checks components of a Hub repository differently.
"""

import json
from collections import Counter
from pathlib import Path

import pytest


CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def reference(run_in_hub_process, tmp_path_factory):
    """Publishes everything; the folder holds what the published pipelines drew."""
    folder = tmp_path_factory.mktemp("reference")
    run_in_hub_process(CLIENTS / "push.py", folder)
    return folder


@pytest.fixture(scope="module")
def pulled_home(hub, reference, run_in_hub_process, tmp_path_factory):
    """Loads everything; the folder is the caches of the client that did."""
    home = tmp_path_factory.mktemp("pulled_home")
    hub.requests.clear()
    run_in_hub_process(CLIENTS / "pull.py", reference, home=home)
    return home


def test_pushed_repositories(hub, reference):
    files = hub.files("user/pipeline")
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "VARPipeline"
    assert index["transformer"] == ["hf_var", "VARTransformer"]
    assert index["vqvae"] == ["hf_var", "VQVAEModel"]
    assert {"transformer/config.json", "transformer/model.safetensors", "README.md"} <= files.keys()
    assert files["vqvae/model.safetensors"] != hub.files("user/pipeline", "v1.0")["vqvae/model.safetensors"]

    for repo_id, prefix in (("user/transformer", "model-"), ("user/half", "transformer/model.fp16-")):
        shards = [path for path in hub.files(repo_id) if path.startswith(prefix) and path.endswith(".safetensors")]
        assert len(shards) > 1
    assert not any(path.endswith(".py") for _, repo_id in hub.repositories for path in hub.files(repo_id))


def test_every_route_loads_what_was_pushed(hub, pulled_home):
    sent = Counter(request.path for request in hub.requests if request.method == "GET" and "/resolve/" in request.path)
    weights = {path: count for path, count in sent.items() if path.endswith(".safetensors")}
    assert weights
    assert set(weights.values()) == {1}  # what is in the cache is not loaded again


def test_anonymous_client_sees_public_repositories_only(reference, run_in_hub_process):
    run_in_hub_process(CLIENTS / "anonymous.py", reference, token=None)


def test_cached_repositories_load_offline(hub, reference, pulled_home, run_in_hub_process):
    hub.requests.clear()
    run_in_hub_process(CLIENTS / "offline.py", reference, home=pulled_home, HF_HUB_OFFLINE="1")
    assert hub.requests == []
