"""A whole machine in one file.

The file is one zstd stream of

    TRIARCH-BACKUP 1\\n
    chunks: kind (1 byte), offset (8), length (4), sha256 (32) over the first three and the payload, then the payload

Numbers are big endian. The kinds, in this order:

    1 manifest      JSON (`model.snapshot.BackupManifest`)
    2 part          JSON (`Part`): a disk of the manifest, or `layer-DIGEST` of its template, begins
    3 data          a block of `BLOCK_BYTES` of that part at `offset`; blocks of zeros are left out; the last is shorter
    4 end of part   empty; `offset` is the part's size
    5 end           empty; `offset` is how many chunks came before

A disk's content must have the digest that the manifest says, a layer that of its name. Whatever else a file holds is
refused: the reader takes no length, size or offset on trust, and keeps no more than one block in memory.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from triarch.errors import CommandFailed, Damaged, Exhausted, Invalid
from triarch.host.files import full_disk_is_exhausted
from triarch.host.sparse import BLOCK_BYTES, ContentDigest, blocks
from triarch.host.zstd import compressing, decompressing
from triarch.model.command import check_command
from triarch.model.names import check_template_name
from triarch.model.resources import format_size
from triarch.model.snapshot import BackupManifest
from triarch.model.template import check_digest, template_digest
from triarch.storage.disk_sets import DISK_NAME, ID

FORMAT = 1
MAGIC = b"TRIARCH-BACKUP 1\n"
MANIFEST, PART, DATA, END_OF_PART, END = 1, 2, 3, 4, 5
LAYER = "layer-"
_HEAD = struct.Struct(">BQI")
_MAX_MANIFEST_BYTES = 4 << 20
_MAX_PART_BYTES = 4 << 10
_MAX_SIZE_BYTES = 1 << 46
_LIMITS = {MANIFEST: _MAX_MANIFEST_BYTES, PART: _MAX_PART_BYTES, DATA: BLOCK_BYTES, END_OF_PART: 0, END: 0}

Tell = Callable[[str, float | None], None]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in a backup."""

    name: str
    size_bytes: int


class Chunk(msgspec.Struct, frozen=True):
    kind: int
    offset: int
    payload: bytes


# -- writing


class _Writer:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._count = 0

    def write(self, kind: int, offset: int, payload: bytes = b"") -> None:
        head = _HEAD.pack(kind, offset, len(payload))
        self._stream.write(head + hashlib.sha256(head + payload).digest())
        self._stream.write(payload)
        self._count += 1

    def end(self) -> None:
        self.write(END, self._count)


def write_backup(
    target: Path, manifest: BackupManifest, files: dict[str, Path], tell: Tell, cancelled: Callable[[], bool]
) -> None:
    """Write the new file `target` (blocking); `files` are the parts by name, in order.

    Raises `Exhausted` when the disk is full; the file is of no use then. It ends early when `cancelled` says so.
    """
    total = sum(path.stat().st_blocks * 512 for path in files.values()) or 1
    done = 0
    with full_disk_is_exhausted("the backup", target.parent), _zstd_is_the_disk(), compressing(target) as stream:
        stream.write(MAGIC)
        writer = _Writer(stream)
        writer.write(MANIFEST, 0, msgspec.json.encode(manifest))
        for name, path in files.items():
            with path.open("rb", buffering=0) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                writer.write(PART, 0, msgspec.json.encode(Part(name=name, size_bytes=size_bytes)))
                for offset, data in blocks(file.fileno(), size_bytes):
                    writer.write(DATA, offset, data)
                    done += len(data)
                    tell(name, min(1.0, done / total))
                    if cancelled():
                        raise Invalid("the export was cancelled")
            writer.write(END_OF_PART, size_bytes)
        writer.end()


@contextmanager
def _zstd_is_the_disk() -> Iterator[None]:
    """zstd itself meets the full disk; what is seen here is its end."""
    try:
        yield
    except (BrokenPipeError, CommandFailed) as error:
        text = error.stderr_tail if isinstance(error, CommandFailed) else ""
        if isinstance(error, BrokenPipeError) or "No space left" in text or "write" in text.lower():
            raise OSError(28, "the disk is full") from error
        raise


# -- reading


def read_manifest(path: Path) -> BackupManifest:
    """The manifest of a backup; the rest is not looked at (blocking). Raises `Damaged`."""
    with _Reader.open(path) as reader:
        return reader.manifest


def read_backup(path: Path, place: Callable[[str], Path], tell: Tell, cancelled: Callable[[], bool]) -> BackupManifest:
    """Write every part of a backup into the new file that `place` names for it (blocking).

    Raises `Damaged` that names the part, `Exhausted` for what the disk has no room for. What was written is then of no
    use; when this returns, every disk and layer of the manifest is there and is what it was.
    """
    with _Reader.open(path) as reader:
        manifest = reader.manifest
        wanted = expected_parts(manifest)
        for name in wanted:
            target = place(name)
            with full_disk_is_exhausted(f"the backup's part '{name}'", target.parent):
                reader.unpack(name, target, manifest, tell, cancelled)
        reader.finish()
        return manifest


def expected_parts(manifest: BackupManifest) -> tuple[str, ...]:
    """What a backup with this manifest holds, in order."""
    layers = manifest.template.layers if manifest.with_template else ()
    return (*(disk.name for disk in manifest.disks), *(f"{LAYER}{layer.digest}" for layer in layers))


class _Reader:
    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._count = 0
        self.part = "manifest"
        if stream.read(len(MAGIC)) != MAGIC:
            raise self.damaged("it does not begin like a backup of Triarch")
        self.manifest = self._read_manifest()

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Reader]:
        reader: _Reader | None = None
        try:
            with decompressing(path) as stream:
                reader = cls(path, stream)
                yield reader
        except CommandFailed as error:
            part = "manifest" if reader is None else reader.part
            said = error.stderr_tail.splitlines()[-1:] or ["it cannot be decompressed"]
            reason = said[0].rpartition(": ")[2].strip().lower()
            raise Damaged(f"the backup is damaged in its part '{part}': {reason}", part=part) from error

    def _read_manifest(self) -> BackupManifest:
        chunk = self._next()
        if chunk.kind != MANIFEST:
            raise self.damaged("there is none")
        try:
            found = msgspec.json.decode(chunk.payload)
            version = found.get("format") if isinstance(found, dict) else None
            if version != FORMAT:
                raise Invalid(
                    f"the backup has format {version!r}; this Triarch reads format {FORMAT}",
                    hint="triarch version",
                )
            manifest = msgspec.json.decode(chunk.payload, type=BackupManifest)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise self.damaged(f"it cannot be read: {error}") from error
        self._check(manifest)
        return manifest

    def _check(self, manifest: BackupManifest) -> None:
        names = expected_parts(manifest)
        if len(set(names)) != len(names) or names[:1] != ("delta",):
            raise self.damaged("it does not begin with one delta, or has a part twice")
        # Every name in it that will be a file's or a key's.
        if any(not DISK_NAME.match(disk.name) for disk in manifest.disks) or not ID.match(manifest.machine.uuid):
            raise self.damaged("it names what can be no disk or machine")
        try:
            for layer in manifest.template.layers:
                check_digest(layer.digest)
            check_template_name(manifest.template.name)
            check_command(manifest.template.command, manifest.template.environment)
        except Invalid as error:
            raise self.damaged(error.message) from error
        sizes = [disk.size_bytes for disk in manifest.disks]
        sizes += [layer.size_bytes for layer in manifest.template.layers]
        if any(not 0 < size_bytes <= _MAX_SIZE_BYTES for size_bytes in sizes):
            raise self.damaged("a disk or layer has no possible size")
        if any(not 0 <= disk.content_bytes <= disk.size_bytes + BLOCK_BYTES for disk in manifest.disks):
            raise self.damaged("a disk has no possible amount of content")
        if manifest.machine.created_at.tzinfo is None or manifest.template.created_at.tzinfo is None:
            raise self.damaged("its machine or template was made at no certain time")
        if template_digest(manifest.template.layers) != manifest.template.digest:
            raise self.damaged("the template's digest is not that of its layers")
        if manifest.machine.template.digest != manifest.template.digest:
            raise self.damaged("the machine stands on another template")

    def unpack(
        self, name: str, target: Path, manifest: BackupManifest, tell: Tell, cancelled: Callable[[], bool]
    ) -> None:
        """One part into a new file."""
        self.part = name
        size_bytes, limit = self._begin_part(name, manifest)
        content, whole = ContentDigest(), hashlib.sha256()
        last, is_layer = -1, name.startswith(LAYER)
        position = 0
        with target.open("xb", buffering=0) as file:
            os.fchmod(file.fileno(), 0o600)
            os.ftruncate(file.fileno(), size_bytes)
            while (chunk := self._next()).kind == DATA:
                offset, data = chunk.offset, chunk.payload
                if offset % BLOCK_BYTES or offset <= last or len(data) != min(BLOCK_BYTES, size_bytes - offset):
                    raise self.damaged(f"a block of {len(data)} bytes at {offset} has no place in it")
                content.add(offset, data)
                if content.content_bytes > limit:
                    raise self.damaged(f"it holds more than the {limit} bytes that it said")
                if is_layer:
                    _hash_zeros(whole, offset - position)
                    whole.update(data)
                    position = offset + len(data)
                _write_at(file.fileno(), data, offset)
                last = offset
                tell(name, content.content_bytes / (limit or 1))
                if cancelled():
                    raise Invalid("the import was cancelled")
            os.fsync(file.fileno())
        if chunk.kind != END_OF_PART or chunk.offset != size_bytes:
            raise self.damaged("it does not end where it should")
        if is_layer:
            _hash_zeros(whole, size_bytes - position)
            good = whole.hexdigest() == name.removeprefix(LAYER)
        else:
            good = content.finish(size_bytes) == next(disk.digest for disk in manifest.disks if disk.name == name)
        if not good:
            raise self.damaged("its content is not what was exported")

    def _begin_part(self, name: str, manifest: BackupManifest) -> tuple[int, int]:
        """Its size, and how many bytes of content there may be."""
        chunk = self._next()
        try:
            part = msgspec.json.decode(chunk.payload, type=Part) if chunk.kind == PART else None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise self.damaged(f"its beginning cannot be read: {error}") from error
        if part is None or part.name != name:
            raise self.damaged("it is not there")
        sizes = {disk.name: (disk.size_bytes, disk.content_bytes) for disk in manifest.disks}
        sizes |= {f"{LAYER}{layer.digest}": (layer.size_bytes,) * 2 for layer in manifest.template.layers}
        if part.size_bytes != sizes[name][0]:
            raise self.damaged("its size is not that of the manifest")
        return sizes[name]

    def finish(self) -> None:
        self.part = "end"
        before = self._count
        chunk = self._next()
        if chunk.kind != END or chunk.offset != before:
            raise self.damaged("something is missing before it")
        if self._stream.read(1):
            raise self.damaged("something follows it")

    def _next(self) -> Chunk:
        head = self._exactly(_HEAD.size)
        kind, offset, length = _HEAD.unpack(head)
        if length > _LIMITS.get(kind, -1):
            raise self.damaged("what follows is no chunk of a backup")
        digest = self._exactly(hashlib.sha256().digest_size)
        payload = self._exactly(length)
        if hashlib.sha256(head + payload).digest() != digest:
            raise self.damaged(f"the checksum of chunk {self._count} is wrong")
        self._count += 1
        return Chunk(kind, offset, payload)

    def _exactly(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        if len(data) != size_bytes:
            raise self.damaged("it ends in the middle")
        return data

    def damaged(self, finding: str) -> Damaged:
        return Damaged(
            f"the backup is damaged in its part '{self.part}': {finding}",
            hint="export the machine again, or use another copy of the file",
            part=self.part,
        )


def check_room(manifest: BackupManifest, free_bytes: int) -> None:
    """Raises `Exhausted` before anything is written."""
    layers = manifest.template.layers if manifest.with_template else ()
    needed = sum(disk.content_bytes for disk in manifest.disks) + sum(layer.size_bytes for layer in layers)
    if needed > free_bytes:
        raise Exhausted(
            f"no room for machine '{manifest.machine.name}': the backup holds {format_size(needed)}, "
            f"{format_size(free_bytes)} are free"
        )


def _hash_zeros(digest: hashlib._Hash, size_bytes: int) -> None:
    while size_bytes > 0:
        piece = min(size_bytes, BLOCK_BYTES)
        digest.update(bytes(piece))
        size_bytes -= piece


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
