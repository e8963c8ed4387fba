"""Streams through zstd(1): compressed into a file, or out of one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from triarch.errors import CommandFailed
from triarch.host.process import STDERR_TAIL_BYTES, find_program, program_environment


@contextmanager
def compressing(path: Path) -> Iterator[IO[bytes]]:
    """What is written goes compressed into the new file `path` (blocking). Raises `OSError`, `CommandFailed`.

    An exception in the block leaves a file that no one should use.
    """
    with path.open("xb") as target:
        process = _start(("zstd", "-q", "-c", "-T0", "-3", "--check"), subprocess.PIPE, target)
        assert process.stdin is not None
        try:
            yield process.stdin
            process.stdin.close()
        except BaseException:
            _kill(process)
            raise
        _finish(process, "zstd")
        target.flush()
        os.fsync(target.fileno())


@contextmanager
def decompressing(path: Path) -> Iterator[IO[bytes]]:
    """What is in `path`, decompressed (blocking). Raises `CommandFailed` at the end of the block for a damaged file.

    More than the 128 MiB that zstd takes by itself no file can make it use. A block that is left early reads no more.
    """
    with path.open("rb") as source:
        process = _start(("zstd", "-q", "-d", "-c"), source, subprocess.PIPE)
        assert process.stdout is not None
        try:
            yield process.stdout
            if process.stdout.read(1):
                return
            _finish(process, "zstd")
        finally:
            _kill(process)


def _start(argv: tuple[str, ...], stdin: int | IO[bytes], stdout: int | IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [find_program(argv[0]), *argv[1:]],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=program_environment(),
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[bytes], name: str) -> None:
    assert process.stderr is not None
    errors = process.stderr.read()
    if process.wait():
        raise CommandFailed((name,), process.returncode, errors[-STDERR_TAIL_BYTES:].decode(errors="replace"))


def _kill(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
