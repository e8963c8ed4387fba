"""From an archive to a finished image: the one path that built and imported trees share."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from triarch.errors import Cancelled, Exhausted, Invalid
from triarch.host.archive import Archive, open_archive
from triarch.host.erofs import check_image
from triarch.host.files import free_space_bytes, full_disk_is_exhausted
from triarch.model.operation import Progress
from triarch.model.resources import format_size
from triarch.model.template import Init
from triarch.templates.erofs import ErofsWriter
from triarch.templates.ids import file_at
from triarch.templates.members import Limits, load_tree
from triarch.templates.normalize import normalize, read_text
from triarch.templates.tar import TarReader
from triarch.templates.tree import Kind, Tree

Report = Callable[[Progress], None]
T = TypeVar("T")

# Machines on the same disk get I/O errors when it is full to the brim.
RESERVED_BYTES = 256 << 20
_LOOK_AT_DISK_BYTES = 32 << 20


class TreeDraft(msgspec.Struct, frozen=True, kw_only=True):
    """A finished EROFS image in the workspace, and what the template's record is to say of it."""

    image: Path
    init: Init
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    os_name: str = ""
    source: str = ""
    cloud_init: bool = False


class TreeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a tree says of itself. `shell` is there for `app` machines that are given no command."""

    init: Init
    os_name: str
    shell: str | None
    cloud_init: bool = False


class Metered:
    """The archive's bytes on their way into the tree: counted, bounded, reported, and stopped when the task is."""

    def __init__(
        self,
        archive: Archive,
        directory: Path,
        *,
        limits: Limits,
        report: Callable[[float], None],
        stop: threading.Event,
    ) -> None:
        self._archive = archive
        self._directory = directory
        self._limits = limits
        self._report = report
        self._read_bytes = 0
        self._looked_at_bytes = -_LOOK_AT_DISK_BYTES
        self._stop = stop

    def read(self, size: int, /) -> bytes:
        data = self._archive.read(size)
        self._read_bytes += len(data)
        if self._stop.is_set():
            raise Cancelled("reading the archive was cancelled")
        if self._read_bytes - self._looked_at_bytes >= _LOOK_AT_DISK_BYTES:
            self._looked_at_bytes = self._read_bytes
            self._look()
        return data

    def _look(self) -> None:
        packed = max(self._archive.position_bytes(), 1)
        if self._read_bytes > self._limits.ratio_from_bytes and self._read_bytes > packed * self._limits.ratio:
            raise Invalid(
                f"the archive unpacks to more than {self._limits.ratio} times its size: "
                f"{format_size(packed)} became {format_size(self._read_bytes)}"
            )
        free = free_space_bytes(self._directory)
        if free < RESERVED_BYTES:
            raise Exhausted(
                f"cannot write a template in {self._directory}: {format_size(free)} are free, "
                f"{format_size(RESERVED_BYTES)} have to stay free",
                hint=f"df -h {self._directory.parent}",
                free_bytes=free,
            )
        self._report(min(packed / max(self._archive.size_bytes, 1), 1.0))


async def make_image(
    archive: Path,
    image: Path,
    *,
    limits: Limits,
    report: Callable[[float], None],
    edit: Callable[[Tree, ErofsWriter], None] | None = None,
) -> TreeFacts:
    """Turn a tar archive into a normalized, verified EROFS image; `edit` changes the tree before it is normalized.

    `report` is called on the event loop with the fraction done. Whatever goes wrong, cancelling included, ends
    everything and removes `image`. Raises `Invalid` for a bad archive, `Exhausted` when the disk is full.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def work() -> TreeFacts:
        with full_disk_is_exhausted("a template", image.parent), open_archive(archive) as opened:
            metered = Metered(
                opened,
                image.parent,
                limits=limits,
                report=lambda fraction: _post(loop, report, fraction),
                stop=stop,
            )
            with image.open("wb+") as file:
                writer = ErofsWriter(file)
                tree = load_tree(TarReader(metered), writer, limits)
                if edit is not None:
                    edit(tree, writer)
                normalize(tree, writer)
                facts = look_at(tree, writer)
                writer.finish(tree)
        return facts

    try:
        facts = await _in_thread(work, stop)
        await check_image(image)
    except BaseException:
        image.unlink(missing_ok=True)
        raise
    return facts


async def _in_thread(work: Callable[[], T], stop: threading.Event) -> T:
    """Run blocking work that heeds `stop`; when this task is cancelled, wait until the work has really ended."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.wait([running])
        raise


def _post(loop: asyncio.AbstractEventLoop, report: Callable[[float], None], fraction: float) -> None:
    loop.call_soon_threadsafe(report, fraction)


def look_at(tree: Tree, writer: ErofsWriter) -> TreeFacts:
    """Find out what a tree is: whether it has an init of its own, its name, and its shell."""
    shells = ("bin/bash", "bin/sh")
    return TreeFacts(
        init=Init.SYSTEM if _has_init(tree) else Init.APP,
        os_name=os_name(tree, writer),
        shell=next((f"/{shell}" for shell in shells if file_at(tree, shell) is not None), None),
        cloud_init=file_at(tree, "usr/bin/cloud-init") is not None,
    )


def _has_init(tree: Tree) -> bool:
    """An executable `/sbin/init`. Small `app` images have BusyBox under that name too: it counts with its scripts."""
    found = tree.resolve((b"sbin", b"init"))
    if found is None or found[1].kind is not Kind.FILE or not found[1].mode & 0o111:
        return False
    is_busybox = found[0][-1].startswith(b"busybox")
    return not is_busybox or any(tree.find(path) is not None for path in ("sbin/openrc", "etc/init.d/rcS"))


def os_name(tree: Tree, writer: ErofsWriter) -> str:
    """PRETTY_NAME or NAME of os-release(5): one printable line of at most 100 characters, or nothing."""
    node = file_at(tree, "etc/os-release") or file_at(tree, "usr/lib/os-release")
    if node is None:
        return ""
    found: dict[str, str] = {}
    for line in read_text(writer, node).decode(errors="replace").splitlines():
        match = re.fullmatch(r"(PRETTY_NAME|NAME)=(.{1,400})", line.strip())
        if match:
            with contextlib.suppress(ValueError):
                found[match[1]] = " ".join(shlex.split(match[2]))
    text = found.get("PRETTY_NAME") or found.get("NAME") or ""
    return "".join(character for character in text if character.isprintable())[:100]
