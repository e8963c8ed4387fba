"""Reading compressed files through the programs that everybody trusts with them."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from triarch.errors import Invalid, NotFound
from triarch.host.process import find_program, program_environment

_MEMORY_LIMIT = "1024MiB"
# What a file starts with, and the program that unpacks it to its standard output.
_FORMATS: tuple[tuple[bytes, tuple[str, ...]], ...] = (
    (b"\x1f\x8b", ("gzip", "-dc")),
    (b"\xfd7zXZ\0", ("xz", "-dc", f"--memlimit-decompress={_MEMORY_LIMIT}")),
    (b"\x28\xb5\x2f\xfd", ("zstd", "-dc", "--memory=1024MB")),
    (b"BZh", ("bzip2", "-dc")),
)


class Archive:
    """An open file whose content is unpacked while it is read."""

    def __init__(self, file: IO[bytes], unpacked: IO[bytes]) -> None:
        self._file = file
        self._unpacked = unpacked
        self.size_bytes = os.fstat(file.fileno()).st_size

    def read(self, size: int, /) -> bytes:
        """At most `size` unpacked bytes, fewer only at the end."""
        return self._unpacked.read(size)

    def position_bytes(self) -> int:
        """How much of the file has been read (the program that unpacks it shares this file's offset)."""
        return os.lseek(self._file.fileno(), 0, os.SEEK_CUR)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a file and find out by its first bytes how it is compressed: gzip, xz, zstd, bzip2 or not at all.

    Whatever ends the block ends the program too. Raises `NotFound`, `MissingProgram`, and `Invalid` when the file is
    not regular or its compressed data is damaged (then this error replaces what the reader made of the bytes).
    """
    try:
        # O_NONBLOCK: opening a fifo must not wait for a writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0)
    except IsADirectoryError as error:
        raise _not_regular(path) from error
    except OSError as error:
        raise NotFound(f"cannot open archive {path}: {(error.strerror or '').lower()}", path=str(path)) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _not_regular(path)
        head = file.read(8)
        file.seek(0)
        argv = next((argv for magic, argv in _FORMATS if head.startswith(magic)), None)
        if argv is None:
            yield Archive(file, file)
        else:
            with _unpacker(argv, file) as unpacked:
                yield Archive(file, unpacked)


def _not_regular(path: Path) -> Invalid:
    return Invalid(f"archive {path} is not a regular file", path=str(path))


@contextlib.contextmanager
def _unpacker(argv: tuple[str, ...], file: IO[bytes]) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [find_program(argv[0]), *argv[1:]],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=program_environment(),
        )
        assert process.stdout is not None
        try:
            yield process.stdout
        except Invalid as error:
            # A cut-off compressed stream looks like a cut-off archive: let the program say which it was.
            _end(process)
            _raise_if_damaged(process, complaints, error)
            raise
        else:
            process.stdout.read(1)
            process.wait()
            _raise_if_damaged(process, complaints, None)
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _raise_if_damaged(process: subprocess.Popen[bytes], complaints: IO[bytes], cause: Exception | None) -> None:
    if process.returncode > 0:
        complaints.seek(0)
        lines = complaints.read(4096).decode(errors="replace").strip().splitlines()
        raise Invalid(
            f"the archive cannot be unpacked: {lines[-1] if lines else 'its compressed data is damaged'}"
        ) from cause
