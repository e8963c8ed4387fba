"""The file server as a program for this host, compiled once and kept in a cache.

`files/*.c` is one program everywhere: the guest pack has it in the init of VMs, the launcher runs it among the files of
containers and of stopped machines. What it speaks is `triarch.model.file_protocol`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from triarch.errors import Denied
from triarch.guest.pack import default_cache
from triarch.host.process import run_async
from triarch.host.sealed import sealed_copy

SOURCE = Path(__file__).parent / "files"
# Speed counts here: the sum of a large file is computed by it.
_COMPILER_FLAGS = ("-static", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-s")


@functools.cache
def _key() -> str:
    digest = hashlib.sha256("\n".join(_COMPILER_FLAGS).encode())
    for path in sorted(SOURCE.glob("*.[ch]")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


async def ensure_file_server(*, cache: Path | None = None) -> Path:
    """The program, compiled when the cache has none (a second). Raises `MissingProgram`, `CommandFailed`, `Denied`."""
    directory = cache or default_cache().with_name("files")
    program = directory / _key()
    if program.exists():
        return program
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Denied(f"cannot make the directory of the file server {directory}: {reason}") from error
    # Several may be at it at once: each makes its own, and the last one stays.
    partial = directory / f"{_key()}.{os.getpid()}"
    sources = sorted(str(path) for path in SOURCE.glob("*.c"))
    try:
        await run_async(("cc", *_COMPILER_FLAGS, "-o", str(partial), *sources))
        partial.rename(program)
    finally:
        partial.unlink(missing_ok=True)
    return program


async def open_file_server() -> int:
    """A descriptor of the program in sealed memory, for the launcher; the caller closes it. Raises as above."""
    return sealed_copy(await ensure_file_server())
