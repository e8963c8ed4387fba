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
    _import_msgspec()
    from triarch.cli.app import run

    code = run(arguments)
    sys.stderr.flush()
    os._exit(code)


def _import_msgspec() -> None:
    """Without typing_extensions, a ninth of a short command: msgspec takes from it what `typing` has since 3.11."""
    name = "typing_extensions"
    if name in sys.modules:
        return
    # An entry that is None makes an import fail as that of an absent module does (the Python reference, 5.3.1).
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401
    finally:
        del sys.modules[name]
