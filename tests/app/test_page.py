# SPDX-License-Identifier: Apache-2.0
"""The app as it is served: through its programming interface, without a browser."""

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from hf_var import DIGITS_CHECKPOINT, EMOJI_CHECKPOINT, VARPipeline, VARTextToImagePipeline
from hf_var.app import launch_app
from pipelines.tiny import seeded


gradio = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from app.serving import served  # noqa: E402


@pytest.fixture(scope="module")
def pipe():
    pipe = VARPipeline.from_pretrained(DIGITS_CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def addresses():
    """Of all machines that this process spoke to since the app was started."""
    return set()


@pytest.fixture(scope="module")
def page(pipe, addresses):
    with pytest.MonkeyPatch.context() as patch:
        connect = socket.socket.connect
        patch.setattr(socket.socket, "connect", lambda self, to: (addresses.add(to), connect(self, to))[1])
        patch.setenv("GRADIO_SHARE", "True")
        with served(pipe) as page:
            yield page


@pytest.fixture(scope="module")
def client(page, tmp_path_factory):
    return new_client(page, tmp_path_factory.mktemp("client"))


def new_client(page, folder):
    # Machines that run tests may be busy.
    patience = {"timeout": 120}
    return Client(page.local_url, download_files=folder, analytics_enabled=False, verbose=False, httpx_kwargs=patience)


@pytest.fixture
def digit(pipe, tmp_path):
    pipe(3, generator=seeded(0)).images[0].save(tmp_path / "three.png")
    return handle_file(str(tmp_path / "three.png"))


def pictures(gallery):
    gallery = gallery["value"] if isinstance(gallery, dict) else gallery
    return [np.asarray(Image.open(entry["image"])) for entry in gallery]


def test_two_users_get_what_the_pipeline_draws(pipe, page, tmp_path):
    clients = [new_client(page, tmp_path / str(user)) for user in range(2)]

    def draw(user, seed):
        return pictures(clients[user].predict(user, 2.0, 2, seed, api_name="/draw")[0])

    with ThreadPoolExecutor() as users:
        calls = [(user, seed) for seed in range(3) for user in range(2)]
        found = list(users.map(draw, *zip(*calls, strict=True)))
    for (user, seed), images in zip(calls, found, strict=True):
        expected = pipe(user, guidance_scale=2.0, num_images_per_label=2, generator=seeded(seed)).images
        assert all(np.array_equal(*pair) for pair in zip(images, map(np.asarray, expected), strict=True))


def test_pictures_grow(client):
    job = client.submit(condition=3, guidance_scale=2.0, number=1, seed=0, api_name="/draw")
    job.result()
    # A frame for each of the five scales, and the result.
    assert [len(scales) for _, scales in job.outputs()] == [1, 2, 3, 4, 5, 5]


def test_a_painted_picture(pipe, client, digit, tmp_path):
    layer = Image.new("RGBA", (16, 16))
    layer.paste((255, 45, 149, 255), (0, 0, 8, 16))
    layer.save(tmp_path / "layer.png")
    drawing = {"background": digit, "layers": [handle_file(str(tmp_path / "layer.png"))], "composite": None}
    (found,) = pictures(client.predict(drawing, True, 8, 2.0, 1, 0, api_name="/repaint")[0])
    before = np.asarray(pipe(3, generator=seeded(0)).images[0])
    assert np.array_equal(found[:, 8:], before[:, 8:])
    assert not np.array_equal(found[:, :8], before[:, :8])


def test_an_uploaded_picture(client, digit):
    varied, scales = client.predict(digit, 0.4, 3, 2.0, 2, 0, api_name="/vary")
    assert len(pictures(varied)) == 2
    assert len(scales) == 2
    classes, table = client.predict(digit, 3, api_name="/score")
    assert classes["label"] == "3"
    assert table.count("\n") == 7
    assert len(pictures(client.predict(digit, api_name="/reconstruct"))) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((3, 2.0, 1, "one"), "The seed must be an integer from 0 to 4294967295, got 'one'."),
        ((3, 2.0, 1, "<b>x</b>"), "got '&lt;b&gt;x&lt;/b&gt;'."),
        ((3, 2.0, 10**9, 0), "The number of pictures must be an integer from 1 to 16, got 1000000000."),
        ((3, 2.0, "many", 0), "The number of pictures must be an integer from 1 to 16, got 'many'."),
        ((3, "much", 1, 0), "guidance_scale"),
        ((99, 2.0, 1, 0), "`class_labels`"),
    ],
)
def test_what_is_wrong_is_said(client, capfd, values, message):
    with pytest.raises(AppError) as found:
        client.predict(*values, api_name="/draw")
    assert message in str(found.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["vary", "score", "reconstruct", "repaint"])
@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_an_upload_that_is_no_picture(client, capfd, tmp_path, name, content):
    sampling = (3, 2.0, 1, 0)
    rest = {"vary": (0.5, *sampling), "score": (3,), "reconstruct": (), "repaint": (True, *sampling)}[name]
    upload = None
    if content is not None:
        (tmp_path / "notes.png").write_bytes(content)
        upload = handle_file(str(tmp_path / "notes.png"))
    if name == "repaint":
        upload = {"background": upload, "layers": [], "composite": None}
    with pytest.raises(AppError) as found:
        client.predict(upload, *rest, api_name=f"/{name}")
    assert ("no picture yet" if content is None else "The picture cannot be read") in str(found.value)
    assert "Traceback" not in capfd.readouterr().err


def test_files_of_the_machine_are_not_read(client):
    with pytest.raises((AppError, ValueError)):
        client.predict({"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}, api_name="/reconstruct")


# After the tests that call the app.
def test_nothing_leaves_the_machine(page, client, addresses):
    assert not page.share
    assert page.share_url is None
    assert page.server_name == "127.0.0.1"
    hosts = {address[0] for address in addresses if isinstance(address, tuple)}
    assert hosts == {"127.0.0.1"}


def tabs(page):
    return [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]


def test_tabs_are_those_that_the_model_has(page):
    assert tabs(page) == ["Draw", "Repaint", "Vary", "Score", "Reconstruct"]


def test_a_model_of_texts_has_all_tabs():
    pipe = VARTextToImagePipeline.from_pretrained(EMOJI_CHECKPOINT, dtype=torch.float32)
    page = launch_app(pipe, title="emoji", prevent_thread_lock=True, quiet=True)
    try:
        assert page.title == "emoji"
        assert tabs(page) == ["Draw", "Repaint", "Vary", "Score", "Reconstruct"]
    finally:
        page.close()


def test_the_functions_need_no_gradio():
    code = "import sys, hf_var.cli, hf_var.app.demo; sys.exit('gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
