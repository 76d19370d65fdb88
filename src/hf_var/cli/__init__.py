# SPDX-License-Identifier: Apache-2.0
"""The command `hf-var`."""

import argparse
import sys

from .. import __version__
from .drawing import add_generate, add_inpaint, add_vary
from .measuring import add_reconstruct, add_score
from .models import add_convert
from .tokenizing import add_tokenize


def main(arguments: list[str] | None = None) -> int:
    """Run `hf-var` with `arguments`, by default those of the process; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"hf-var {options.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f'hf-var {options.command}: {error}. Try: pip install "hf_var[train]"', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-var", description="Visual autoregressive models (VAR).")
    parser.add_argument("--version", action="version", version=f"hf-var {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_generate,
        add_inpaint,
        add_vary,
        add_score,
        add_reconstruct,
        add_convert,
        add_tokenize,
    ):
        add(commands)
    return parser
