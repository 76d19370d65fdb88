# SPDX-License-Identifier: Apache-2.0
"""
What the console script `hf-var` calls. It is a module of its own because whatever imports a part of `hf_var` imports all of
it, which takes seconds, unless `hf_var` finds here that the process is the command.
"""

is_running = False


def main() -> int:
    """Run `hf-var` with the arguments of the process; returns the exit status."""
    # Processes that the command starts import this module as well, and need the whole package.
    global is_running
    is_running = True
    from hf_var.cli import main

    return main()
