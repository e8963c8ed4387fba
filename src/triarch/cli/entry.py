"""`triarch`: decides what to import before it imports anything."""

from __future__ import annotations

import os
import sys

import triarch


def main() -> int:
    """The exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C; for exec and run the guest's own."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"triarch {triarch.__version__}")
        return 0
    # A command lives for milliseconds: collecting garbage, and taking every module apart at the end, is a sixth of it.
    import gc

    gc.disable()
    from triarch.cli.app import run

    code = run(arguments)
    sys.stderr.flush()
    os._exit(code)
