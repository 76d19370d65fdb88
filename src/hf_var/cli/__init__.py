# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .drawing import add_generate, add_inpaint, add_vary
from .jobs import JOBS
from .measuring import add_reconstruct, add_score
from .models import add_convert


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
            command = options.command
            options.run(options)
    except (ValueError, OSError) as error:
        # Those of the libraries may have several lines.
        print(f"hf-var {command}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f'hf-var {command}: {error}. Try: pip install "hf_var[train,eval]"', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-var", description="Visual autoregressive models (VAR).")
    parser.add_argument("--version", action="version", version=f"hf-var {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_generate, add_inpaint, add_vary, add_score, add_reconstruct, add_convert):
        add(commands)
    # Their own parsers, made when they are called, need what comes with an extra.
    for name, (_, text) in JOBS.items():
        commands.add_parser(name, help=text)
    return parser
