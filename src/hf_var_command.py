# SPDX-License-Identifier: Apache-2.0
"""
What the console script `hf-var` calls. It is a module of its own because whatever imports a part of `hf_var` imports all of
it, which takes seconds, unless `hf_var` finds here that the process is the command.
"""

is_running = False


def script() -> int:
    """The console script, in whose process nothing but the command uses `hf_var`."""
    # Processes that the command starts import this module as well, and need the whole package.
    global is_running
    is_running = True
    return main()


def main() -> int:
    """Run `hf-var` with the arguments of the process; returns the exit status."""
    from hf_var.cli import main

    return main()
