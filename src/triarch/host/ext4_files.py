"""Single files of an ext4 image that is not mounted, by debugfs(8): in user space, whatever a guest made of the image.

Names are those that the caller knows: nothing that comes out of an image becomes a command.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from triarch.errors import CommandFailed, Invalid
from triarch.host.process import find_program, program_environment, run

_NAME = re.compile(r"[A-Za-z0-9._/-]{1,200}\Z")
_REGULAR = "10"
MAX_FILE_BYTES = 64 << 10


def list_files(image: Path, directory: str) -> tuple[str, ...]:
    """The names of ordinary files in a directory of the image; empty when there is none. Odd names are left out."""
    listing = run(["debugfs", "-R", f"ls -p {_checked(directory)}", str(image)]).decode(errors="replace")
    # "/INODE/MODE/UID/GID/NAME/SIZE/"
    entries = [line.split("/") for line in listing.splitlines()]
    files = (fields[5] for fields in entries if len(fields) == 8 and fields[2].startswith(_REGULAR))
    return tuple(name for name in files if _NAME.match(name))


def read_file(image: Path, name: str) -> bytes:
    """The beginning of a file of the image, all of a small one: a guest can make terabytes out of a hole."""
    argv = ("debugfs", "-R", f"cat {_checked(name)}", str(image))
    with subprocess.Popen(
        [find_program(argv[0]), *argv[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=program_environment(),
    ) as process:
        assert process.stdout is not None
        content = process.stdout.read(MAX_FILE_BYTES)
        if len(content) == MAX_FILE_BYTES:
            process.kill()
            return content
    if process.returncode:
        raise CommandFailed(argv, process.returncode, "")
    return content


def remove_file(image: Path, name: str) -> None:
    """Absent is success."""
    _edit(image, f"rm {_checked(name)}\n")


def replace_file(image: Path, name: str, content: bytes, mode: int) -> None:
    """Give a file of the image another content; its owner is 0:0 then."""
    with tempfile.NamedTemporaryFile() as source:
        source.write(content)
        source.flush()
        checked = _checked(name)
        field = f"set_inode_field {checked} mode 0{0o100000 | mode:o}"
        _edit(image, f"rm {checked}\nwrite {source.name} {checked}\n{field}\n")


def _edit(image: Path, commands: str) -> None:
    run(["debugfs", "-w", "-f", "-", str(image)], input_bytes=commands.encode())


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise Invalid(f"illegal name {name[:80]!r} of a file in an image")
    return name
