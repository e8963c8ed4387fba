"""`triarchd`: the daemon's command."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

import triarch
from triarch.daemon.listen import Possession
from triarch.errors import Error
from triarch.model.instance import Instance, default_instance, instance_at
from triarch.model.operation import Problem

READY = b"ready\n"
MAX_LOG_BYTES = 8 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, SIGINT or `triarch down`. Machines outlive the daemon unless `down` stopped them."""
    options = _parse(argv)
    parent = os.dup(1) if options.background else -1
    try:
        instance = instance_at(options.root) if options.root else default_instance()
        if options.doctor:
            return _print_doctor(instance)
        possession = Possession(instance)
        with possession as listener:
            if options.background:
                _log_to_file(instance)
            _set_up_logging()
            # The listener is up before the slow imports: who connects now waits in its queue.
            from triarch.daemon.server import serve

            possession.clear = asyncio.run(serve(instance, listener, lambda: _tell(parent, READY)))
    except Error as error:
        logging.getLogger(__name__).debug("cannot serve", exc_info=True)
        _tell(parent, msgspec.json.encode(Problem.of(error)))
        print(f"triarchd: error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="triarchd", description="The Triarch daemon.")
    parser.add_argument("--version", action="version", version=f"triarchd {triarch.__version__}")
    parser.add_argument(
        "--root", metavar="DIR", default=os.environ.get("TRIARCH_ROOT"), help="serve the separate instance in DIR"
    )
    parser.add_argument(
        "--background",
        action="store_true",
        help="log to the run directory; write 'ready' (or a problem as JSON) to standard output, then close it",
    )
    parser.add_argument("--doctor", action="store_true", help="print what this host can do as JSON, and end")
    return parser.parse_args(argv)


def _tell(parent: int, message: bytes) -> None:
    """Say how the start went to the process that started this one, once, and let go of it."""
    if parent < 0:
        return
    try:
        os.write(parent, message)
        os.close(parent)
    except OSError:
        logging.getLogger(__name__).debug("nobody waits for the daemon's start")


def _log_to_file(instance: Instance) -> None:
    path = Path(instance.run_dir) / "triarchd.log"
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o640)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _set_up_logging() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("TRIARCH_LOG", "INFO").upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _print_doctor(instance: Instance) -> int:
    from triarch.daemon.server import doctor

    sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(doctor(instance))) + b"\n")
    return 0
