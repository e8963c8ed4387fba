"""Checking EROFS images with the reference implementation."""

from __future__ import annotations

from pathlib import Path

from triarch.errors import CommandFailed, Damaged
from triarch.host.process import run_async


async def check_image(path: Path) -> None:
    """Walk every inode and directory of an EROFS image. Raises `Damaged`, `MissingProgram`.

    erofs-utils 1.5 ends with code 0 even after a wrong checksum: what it complains about counts as well.
    """
    complaints: list[str] = []

    def listen(line: str) -> None:
        if "<E> erofs:" in line:
            complaints.append(line.partition("<E> erofs:")[2].strip())

    try:
        await run_async(["fsck.erofs", str(path)], on_line=listen)
    except CommandFailed as error:
        complaints.append(error.message)
    if complaints:
        raise Damaged(f"the EROFS image {path} is damaged: {complaints[0]}", path=str(path))
