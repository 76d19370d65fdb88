# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from safetensors import SafetensorError

from .. import __version__
from .app import add_app
from .drawing import add_generate, add_inpaint, add_vary
from .exporting import add_export
from .flags import load_library
from .jobs import JOBS
from .measuring import add_reconstruct, add_score
from .models import add_convert
from .scheduling import add_schedule


# Each adds its parser, which sets two functions of the options: `check`, if it has any, is called before anything that takes
# seconds is imported, and `run` imports that itself.
COMMANDS = (
    add_generate,
    add_inpaint,
    add_vary,
    add_score,
    add_reconstruct,
    add_app,
    add_convert,
    add_export,
    add_schedule,
)
# What a command needs beyond the core, unless that is what trainings and evaluations need.
EXTRAS = {"app": "app"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `hf-var` with `arguments`, by default those of the process; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else ""
    try:
        if command in JOBS:
            run, _ = JOBS[command]
            run(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.check(options)
            load_library()
            options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads the output any more. Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    # What the library, the Hub's client and the readers of files raise for what a user gave; all else is a bug.
    except (ValueError, OSError, SafetensorError) as error:
        _complain(command, str(error) or type(error).__name__)
        return 2
    except ModuleNotFoundError as error:
        _complain(command, f'{error}. Try: pip install "hf_var[{EXTRAS.get(command, "train,eval")}]"')
        return 2
    return 0


def _complain(command: str, message: str) -> None:
    """One line; the messages of the libraries may have several, and names of files anything."""
    line = " ".join(f"hf-var {command}: {message}".split())
    print(line.encode("utf-8", "backslashreplace").decode("utf-8"), file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse's, which raises what it would print below its usage before it ends the program."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; {self.prog} --help lists the arguments.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-var", description="Visual autoregressive models (VAR).")
    parser.add_argument("--version", action="version", version=f"hf-var {__version__}")
    parser.set_defaults(check=lambda options: None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    # Their own parsers, made when they are called, need what comes with an extra.
    for name, (_, text) in JOBS.items():
        commands.add_parser(name, help=text)
    return parser
