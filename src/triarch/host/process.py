"""Running programs: the only place outside the launcher that spawns processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence

from triarch.errors import CommandFailed, MissingProgram

# Debian package of every program that Triarch runs.
PACKAGES: dict[str, str] = {
    "cc": "gcc",
    "bzip2": "bzip2",
    "conmon": "conmon",
    "cpio": "cpio",
    "crun": "crun",
    "debugfs": "e2fsprogs",
    "depmod": "kmod",
    "dnsmasq": "dnsmasq-base",
    "dpkg-deb": "dpkg",
    "dumpe2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fakechroot": "fakechroot",
    "fakeroot": "fakeroot",
    "fsck.erofs": "erofs-utils",
    "gzip": "gzip",
    "ip": "iproute2",
    "lz4": "lz4",
    "mkfs.erofs": "erofs-utils",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "modprobe": "kmod",
    "nft": "nftables",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "tar": "tar",
    "virtiofsd": "qemu-system-common",
    "xz": "xz-utils",
    "zstd": "zstd",
}
STDERR_TAIL_BYTES = 4096
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_program(name: str) -> str:
    """The absolute path of a program, looked for in the system directories too. Raises `MissingProgram`."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
    if path is None:
        raise MissingProgram(name, PACKAGES.get(name, name))
    return path


def program_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A small, fixed environment for programs: nothing of the caller's leaks into them but proxies and the home."""
    kept = ("HOME", "http_proxy", "https_proxy", "no_proxy", "TMPDIR", "XDG_RUNTIME_DIR")
    base = {name: os.environ[name] for name in kept if name in os.environ}
    return {**base, "PATH": _SYSTEM_PATH, "LC_ALL": "C.UTF-8", **(extra or {})}


def run(
    argv: Sequence[str], *, input_bytes: bytes | None = None, environment: Mapping[str, str] | None = None
) -> bytes:
    """Run to the end (blocking) and return standard output. Raises `CommandFailed` or `MissingProgram`."""
    done = subprocess.run(
        [find_program(argv[0]), *argv[1:]],
        input=input_bytes,
        stdin=subprocess.DEVNULL if input_bytes is None else None,
        capture_output=True,
        env=program_environment(environment),
        check=False,
    )
    if done.returncode:
        raise CommandFailed(argv, done.returncode, done.stderr[-STDERR_TAIL_BYTES:].decode(errors="replace"))
    return done.stdout


async def run_async(
    argv: Sequence[str],
    *,
    on_line: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> bytes:
    """As `run`, in its own session; `on_line` sees each line of standard error. Cancelling ends the whole session."""
    process = await asyncio.create_subprocess_exec(
        find_program(argv[0]),
        *argv[1:],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=program_environment(environment),
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        output, tail = await asyncio.gather(process.stdout.read(), _read_lines(process.stderr, on_line))
        returncode = await process.wait()
    except BaseException:
        await _end_session(process)
        raise
    if returncode:
        raise CommandFailed(argv, returncode, tail)
    return output


async def _read_lines(stream: asyncio.StreamReader, on_line: Callable[[str], None] | None) -> str:
    tail = b""
    pending = b""
    while chunk := await stream.read(65536):
        tail = (tail + chunk)[-STDERR_TAIL_BYTES:]
        if on_line is None:
            continue
        *lines, pending = (pending + chunk).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            on_line(line.decode(errors="replace"))
    return tail.decode(errors="replace")


async def _end_session(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the whole session so that programs clean up (mmdebstrap unmounts), SIGKILL after ten seconds."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            await asyncio.wait_for(asyncio.shield(process.wait()), 10)
        except TimeoutError:
            continue
