"""Trees that no machine runs in: of a stopped machine, of a snapshot, of a template.

A launcher of its own assembles a tree as a container's start does and runs the file server (`guest/files`) in it,
alone, as the root of a user namespace. It is another launcher than the container driver's, so that a visit that hangs
is in nobody's way, and it is there only from the first visit on.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator

import msgspec

from triarch.errors import Damaged, Error, Failed, NotFound, Unsupported
from triarch.guest.file_server import open_file_server
from triarch.host.carry import Stdio, carry
from triarch.host.launcher.client import Launcher
from triarch.host.launcher.protocol import LayerSource, Visit
from triarch.host.rights import rights
from triarch.model.driver import LayerFile
from triarch.model.file_protocol import (
    FileEntry,
    FileKind,
    Flag,
    Frame,
    FrameReader,
    decode_entry,
    decode_fault,
    decode_finish,
    decode_hello,
    get_request,
)
from triarch.model.instance import Instance
from triarch.model.machine import IdRange

_CHUNK_BYTES = 256 << 10


class Tree(msgspec.Struct, frozen=True, kw_only=True):
    """What a tree is made of. `layers` are lowest first; without a delta it is the template's own.

    `ids` are the host's that the tree's own are mapped to meanwhile, those of its machine.
    """

    layers: tuple[LayerFile, ...]
    delta_path: str | None
    ids: IdRange
    read_only: bool = True


class TreeObject(msgspec.Struct, frozen=True, kw_only=True):
    """An object that a walk met, and the SHA-256 of a file's content if that was asked for."""

    entry: FileEntry
    sha256: bytes | None = None


class Trees:
    """Visits to trees. Each holds its delta's lock; when the daemon dies, so do they with their mounts."""

    def __init__(self, instance: Instance) -> None:
        self._launcher = Launcher(f"{instance.run_dir}/visits")

    async def close(self) -> None:
        """End every visit."""
        await self._launcher.close()

    def check(self) -> None:
        """Raise `Unsupported` where this daemon may not mount."""
        obstacle = rights().obstacle
        if obstacle is not None:
            raise Unsupported(f"this daemon cannot open a tree in which nothing runs: {obstacle.reason}")

    async def serve(self, tree: Tree, stdio: Stdio) -> None:
        """Let the file server speak with `stdio` about a tree; return when it has ended and all mounts are gone.

        Raises `Busy` when something holds the delta, `Damaged`, `NotFound` for a layer that is gone, `Unsupported`.
        """
        await carry(stdio, lambda fd: self._visit(tree, fd))

    async def _visit(self, tree: Tree, stdio_fd: int) -> None:
        self.check()
        request = Visit(
            id=0,
            layers=tuple(LayerSource(digest=layer.digest, path=layer.path) for layer in tree.layers),
            delta_path=tree.delta_path,
            read_only=tree.read_only,
            id_base=tree.ids.base,
            id_count=tree.ids.count,
        )
        program_fd = await open_file_server()
        try:
            await self._launcher.visit(request, program_fd, stdio_fd)
        finally:
            os.close(program_fd)

    async def walk(self, tree: Tree, path: bytes = b"/", *, sums: bool = False) -> AsyncIterator[TreeObject]:
        """Everything at and below `path`, in the directories' own order, with paths relative to it ("" is itself).

        With `sums` every file is read. Raises as `serve`, `NotFound` when there is no such path, and `Failed` or
        `Damaged` when something in the tree cannot be read.
        """
        flags = Flag.RECURSIVE | Flag.NO_DATA | (Flag.SUM if sums else Flag.NONE)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            visit = asyncio.ensure_future(self._visit(tree, theirs.fileno()))
            visit.add_done_callback(lambda _: theirs.close())
            try:
                await asyncio.get_running_loop().sock_sendall(ours, get_request(path, flags))
                async for item in _objects(ours, sums=sums):
                    yield item
                ours.close()
                await visit
            except _EndedEarly as error:
                await visit
                raise Damaged("the file server ended before it had told all of the tree") from error
            finally:
                visit.cancel()
                await asyncio.gather(visit, return_exceptions=True)


class _EndedEarly(Exception):
    """Nothing more comes: why, the visit knows."""


async def _objects(connection: socket.socket, *, sums: bool) -> AsyncIterator[TreeObject]:
    """What a server tells of a tree, file and sum together."""
    loop = asyncio.get_running_loop()
    reader = FrameReader()
    file: FileEntry | None = None
    while data := await loop.sock_recv(connection, _CHUNK_BYTES):
        reader.feed(data)
        for kind, payload in reader.frames():
            match kind:
                case Frame.HELLO:
                    decode_hello(payload)
                case Frame.ENTRY:
                    entry = decode_entry(payload)
                    if sums and entry.kind is FileKind.FILE:
                        file = entry
                    else:
                        yield TreeObject(entry=entry)
                case Frame.FINISH if file is not None:
                    yield TreeObject(entry=file, sha256=decode_finish(payload).sha256)
                    file = None
                case Frame.ERROR:
                    raise _failure(payload)
                case Frame.DONE:
                    return
                case _:
                    raise Damaged(f"the file server sent {kind.name} in the middle of a walk")
    raise _EndedEarly


def _failure(payload: bytes) -> Error:
    fault = decode_fault(payload)
    path, reason = os.fsdecode(fault.path), os.strerror(fault.number).lower()
    if fault.number == errno.ENOENT:
        return NotFound(f"there is no '{path}' in this tree", path=path)
    return Failed(f"cannot read '{path}' in this tree: {reason}", path=path)
