# SPDX-License-Identifier: Apache-2.0
"""`hf-var app` on the command line."""

import socket
import sys

import pytest
import torch

from hf_var import EMOJI_CHECKPOINT
from hf_var.cli import main


@pytest.fixture
def launched(monkeypatch):
    """What was to be served, without a server that would last."""
    pytest.importorskip("gradio")
    from hf_var.app import page

    calls = []

    def launch(made, **options):
        calls.append((made, options))
        made.share_url, made.local_url = None, f"http://{options['server_name']}:1/"
        made.block_thread = lambda: None

    monkeypatch.setattr(page, "launch_page", launch)
    return calls


def test_the_page_is_of_this_machine_unless_it_is_asked_for_more(launched, capsys):
    assert main(["app"]) == 0
    assert capsys.readouterr().out == "http://127.0.0.1:1/ shows the app. Ctrl+C ends it.\n"
    page, options = launched[0]
    assert page.title == "hf_var: emoji"
    private = {"server_name": "127.0.0.1", "server_port": None, "share": False}
    assert private.items() <= options.items()
    assert main(["app", "--model", "digits", "--host", "0.0.0.0", "--port", "7999", "--share"]) == 0
    page, options = launched[1]
    assert page.title == "hf_var: digits"
    assert {"server_name": "0.0.0.0", "server_port": 7999, "share": True}.items() <= options.items()


@pytest.mark.parametrize("words", [["--share=False"], ["--share", "false"], []])
def test_share_may_be_denied(launched, words):
    assert main(["app", "--model", "digits", *words]) == 0
    assert launched[0][1]["share"] is False


def test_names_of_checkpoints_that_ship_with_the_package(tmp_path, monkeypatch, capsys):
    """They work for all commands, unless there is such a folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", "digits", "--class-labels", "3", "--output", "three.png"]) == 0
    (tmp_path / "digits").mkdir()
    assert main(["generate", "--model", "digits", "--class-labels", "3", "--output", "four.png"]) == 2
    assert "model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port must be from 1 to 65535, got 0."),
        (["--port", "65536"], "--port must be from 1 to 65535, got 65536."),
        (["--port", "http"], "--port"),
        (["--share=maybe"], "--share"),
        (["--model", "no/such"], "no/such"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(capsys, words, message):
    pytest.importorskip("gradio")
    assert main(["app", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-var app: ")
    assert message in error


def test_a_port_that_is_taken(capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["app", "--model", "digits", "--port", str(port)]) == 2
    assert str(port) in capsys.readouterr().err.strip().splitlines()[-1]


def test_how_to_install_it_is_said(monkeypatch, capsys):
    for name in [name for name in sys.modules if name == "gradio" or name.startswith(("gradio.", "hf_var.app."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert 'Try: pip install "hf_var[app]"' in capsys.readouterr().err


def test_the_space_calls_the_same_function(monkeypatch):
    import runpy
    from pathlib import Path

    from hf_var import app

    calls = []
    monkeypatch.setattr(app, "launch_app", lambda pipe, **options: calls.append((pipe, options)))
    space = Path(__file__).parents[2] / "examples" / "space"
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    ((pipe, options),) = calls
    assert pipe.config["_name_or_path"] == EMOJI_CHECKPOINT
    assert pipe.dtype == torch.float32
    assert options == {"title": "Emoji from texts"}
    assert (space / "requirements.txt").read_text().split() == ["hf-var[app]"]
