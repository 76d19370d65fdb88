# SPDX-License-Identifier: Apache-2.0
"""The server of the examples on a local Ray: users who come at the same time share calls and get their own images."""

import asyncio
import os
from urllib.parse import urlencode

import numpy as np
import pytest
import torch

from examples.conftest import REPOSITORY
from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT
from hf_var.pipelines.base import load_pipeline
from pipelines.stacked import make_raster
from pipelines.tiny import make_pipeline, seeded


ray = pytest.importorskip("ray", reason="needs the extra `serve`")
serve = pytest.importorskip("ray.serve", reason="needs the extra `serve`")
PROMPTS = ["3", "1", "4", "", "5", "9", "3", "id:6"]
CAPTIONS = ["a red heart", "a green book", "", "a red heart"]


@pytest.fixture(scope="module")
def deployment():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "examples")
        from serve_ray import Images

        yield Images


@pytest.fixture(scope="module")
def cluster():
    paths = [str(REPOSITORY / "examples"), str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.parametrize(("model", "prompts"), [(DIGITS_CHECKPOINT, PROMPTS), (EMOJI_CHECKPOINT, CAPTIONS)])
def test_users_share_calls_and_get_their_own_images(deployment, cluster, model, prompts):
    server = serve.run(deployment.bind(model, "cpu"))
    responses = [server.draw.remote(prompt, seed) for seed, prompt in enumerate(prompts)]
    images = [response.result(timeout_s=120) for response in responses]
    pipe = load_pipeline(model, dtype=torch.float32)
    for seed, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        assert np.array_equal(image, pipe(prompt=prompt, generator=seeded(seed)).images[0])
    batch_sizes = server.get_batch_sizes.remote().result(timeout_s=60)
    assert sum(batch_sizes) == len(prompts)
    assert len(batch_sizes) < len(prompts)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"prompt": "a cat"}, "unknown name 'a cat'"),
        ({"prompt": "12"}, "must be in"),
        ({"prompt": "3", "seed": -1}, "`seed` must be from 0"),
        ({"prompt": "3", "seed": 2**70}, "`seed` must be from 0"),
        ({"prompt": "3", "seed": "x"}, "invalid literal"),
    ],
    ids=repr,
)
def test_mistakes_are_refused_before_the_batch(deployment, query, message):
    from starlette.requests import Request

    server = deployment.func_or_class(DIGITS_CHECKPOINT, "cpu")
    response = asyncio.run(server(Request({"type": "http", "query_string": urlencode(query).encode()})))
    assert response.status_code == 400
    assert message in response.body.decode()


def test_a_model_without_unconditional_images_needs_a_class(deployment, tmp_path):
    make_raster(class_dropout_prob=0.0).save_pretrained(tmp_path)
    server = deployment.func_or_class(str(tmp_path), "cpu")
    with pytest.raises(ValueError, match="`prompt` must be a class"):
        asyncio.run(server.draw(""))


def test_a_model_without_classes_takes_no_prompt(deployment, tmp_path):
    make_pipeline(transformer={"num_labels": 0}).save_pretrained(tmp_path)
    server = deployment.func_or_class(str(tmp_path), "cpu")
    with pytest.raises(ValueError, match="the model has no classes"):
        asyncio.run(server.draw("3"))
