"""This end of a copy: reading trees of ours, and writing trees that a guest describes.

Everything is relative to open directories and no link is followed below the place that was named, so that a hostile
tree (links that lead out, `..`, absolute names) cannot make us write anywhere else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator

import msgspec

from triarch.errors import Damaged
from triarch.model.file_protocol import MAX_UNSIZED_BYTES, PARTIAL_NAME, FileEntry, FileKind, kind_of_mode

# Files from here on are worth going on with after a broken connection.
RESUMABLE_BYTES = 8 << 20
_PERMISSIONS = 0o7777
_HARMLESS_PERMISSIONS = 0o1777
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE_BYTES = 1 << 20
_KEPT_XATTRS = (b"user.", b"system.posix_acl_")
_CAPABILITY = b"security.capability"


class Transfer(msgspec.Struct):
    """What was copied so far; `total_bytes` is known of single files."""

    name: str = ""
    files: int = 0
    done_bytes: int = 0
    total_bytes: int | None = None


Report = Callable[[Transfer], None]


def tag_of(*parts: bytes) -> int:
    """A number for the partial copy of one state of one file; never 0."""
    return int.from_bytes(hashlib.sha256(b"\0".join(parts)).digest()[:8], "big") or 1


def partial_name(tag: int) -> bytes:
    return (PARTIAL_NAME % tag).encode()


def sha256_of(fd: int, size_bytes: int) -> bytes:
    """Of the first `size_bytes` of an open file."""
    digest, at = hashlib.sha256(), 0
    while at < size_bytes and (piece := os.pread(fd, min(_PIECE_BYTES, size_bytes - at), at)):
        digest.update(piece)
        at += len(piece)
    return digest.digest()


def is_kept(name: bytes) -> bool:
    """Whether an extended attribute belongs to a file, and not to the host that it is on."""
    return name == _CAPABILITY or name.startswith(_KEPT_XATTRS)


def xattrs_of(path: bytes | int) -> tuple[tuple[bytes, bytes], ...]:
    """Those that are kept; none where there are none or they may not be read."""
    try:
        names = os.listxattr(path) if isinstance(path, int) else os.listxattr(path, follow_symlinks=False)
    except OSError:
        return ()
    found = []
    for name in names:
        encoded = os.fsencode(name)
        if is_kept(encoded):
            try:
                found.append((encoded, os.getxattr(path, name)))
            except OSError:
                continue
    return tuple(found)


def describe(path: bytes, status: os.stat_result, target: bytes = b"") -> FileEntry:
    """An object of ours as the file server gets it, without extended attributes."""
    return FileEntry(
        path=path,
        kind=kind_of_mode(status.st_mode),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size_bytes=status.st_size if stat.S_ISREG(status.st_mode) else 0,
        modified_ns=status.st_mtime_ns,
        target=target,
    )


def extents(fd: int, status: os.stat_result, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where a file has data: (offset, end) from `start` on; holes are left out."""
    size = status.st_size
    if status.st_blocks * 512 >= size:
        if start < size:
            yield start, size
        return
    at = start
    while at < size:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                yield at, size
            return
        if data >= size:
            return
        yield data, min(hole, size)
        at = hole


class _Open(msgspec.Struct):
    """A directory that is being filled. `entry` is what it becomes when it is left; None for one that was there."""

    name: bytes
    fd: int
    entry: FileEntry | None


class Writer:
    """Makes what a guest's tree consists of at one place: `name` in the directory `parent`, and below it.

    Entries come in the order in which a tree is walked. Methods raise `OSError` for an object that cannot be made, and
    `Damaged` for one that no tree has.
    """

    def __init__(self, parent_fd: int, name: bytes, *, trusted: bool = False) -> None:
        """With `trusted` set-user-ID bits and file capabilities are kept: they give rights on this host."""
        self._top = parent_fd
        self._name = _component(name)
        self._trusted = trusted
        self._owners = os.geteuid() == 0
        self._open: list[_Open] = []
        self._file_fd = -1
        self._file: FileEntry | None = None
        self._partial = b""
        self._keep = False
        self.disarmed = 0

    def close(self) -> None:
        """Leave nothing half-written but what may be gone on with."""
        self._drop_file()
        while self._open:
            self._leave()

    # -- places

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The open directory that `path` is in, and its name there."""
        if not path:
            self._leave_all_but(0)
            return self._top, self._name
        parts = [self._name, *(_component(part) for part in path.split(b"/"))]
        common = 0
        for each, part in zip(self._open, parts[:-1], strict=False):
            if each.name != part:
                break
            common += 1
        self._leave_all_but(common)
        for part in parts[common:-1]:
            self._enter(part, None)
        return self._open[-1].fd, parts[-1]

    def _enter(self, name: bytes, entry: FileEntry | None) -> None:
        above = self._open[-1].fd if self._open else self._top
        self._open.append(_Open(name, os.open(name, _DIRECTORY_FLAGS, dir_fd=above), entry))

    def _leave_all_but(self, count: int) -> None:
        while len(self._open) > count:
            self._leave()

    def _leave(self) -> None:
        left = self._open.pop()
        try:
            if left.entry is not None:
                self._dress(left.fd, left.entry)
        finally:
            os.close(left.fd)

    # -- objects

    def make(self, entry: FileEntry) -> None:
        """Make anything but a file. Devices and sockets are none of ours: they raise `OSError` (EPERM)."""
        self._drop_file()
        if entry.kind is FileKind.DIRECTORY:
            self._make_directory(entry)
            return
        parent, name = self._place(entry.path)
        # Under another name first: it takes the place of what is there.
        made = partial_name(int.from_bytes(os.urandom(8), "big"))
        try:
            if entry.kind is FileKind.SYMLINK:
                os.symlink(entry.target, made, dir_fd=parent)
            elif entry.kind is FileKind.FIFO:
                os.mkfifo(made, 0o600, dir_fd=parent)
                os.chmod(made, self._mode(entry), dir_fd=parent)
            elif entry.kind is FileKind.LINK:
                self._link(entry, made, parent)
            else:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            if entry.kind is not FileKind.LINK:
                if self._owners:
                    os.chown(made, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
                times = (entry.modified_ns, entry.modified_ns)
                os.utime(made, ns=times, dir_fd=parent, follow_symlinks=False)
            os.rename(made, name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            # Also when it worked: rename(2) leaves a second name of one file alone.
            _unlink(made, parent)

    def _link(self, entry: FileEntry, made: bytes, parent: int) -> None:
        """The first name is looked for as carefully as any place; it may be in a directory that was left already."""
        if not entry.path:
            raise Damaged("the file server said that the object itself is a link to one in it")
        *above, last = [self._name, *(_component(part) for part in entry.target.split(b"/"))]
        fd = os.dup(self._top)
        try:
            for part in above:
                below = os.open(part, _DIRECTORY_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = below
            os.link(last, made, src_dir_fd=fd, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(fd)

    def _make_directory(self, entry: FileEntry) -> None:
        parent, name = self._place(entry.path)
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            self._enter(name, None)
        else:
            self._enter(name, entry)

    def begin(self, entry: FileEntry, partial: bytes | None = None, offset: int = 0) -> None:
        """Begin a file; `partial` names a copy that stays when it is not ended, and that `offset` goes on with."""
        self._drop_file()
        parent, name = self._place(entry.path)
        self._keep = partial is not None
        self._partial = partial or partial_name(int.from_bytes(os.urandom(8), "big"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._file_fd = os.open(self._partial, flags | (0 if self._keep else os.O_EXCL), 0o600, dir_fd=parent)
        if not _is_ours(self._file_fd):
            os.close(self._file_fd)
            raise OSError(errno.EEXIST, f"{os.fsdecode(self._partial)} beside it is not ours alone")
        self._file_parent, self._file_name, self._file = parent, name, entry
        os.ftruncate(self._file_fd, offset)

    @property
    def is_writing(self) -> bool:
        return self._file is not None

    def write(self, offset: int, data: memoryview) -> None:
        """A piece of the file that was begun; pieces of one that failed are dropped."""
        if self._file is None:
            return
        room = self._file.size_bytes or MAX_UNSIZED_BYTES
        if offset + len(data) > room:
            raise Damaged(f"the file server sent more of '{self._file.name}' than it said there is")
        while data:
            done = os.pwrite(self._file_fd, data, offset)
            data, offset = data[done:], offset + done

    def end(self, size_bytes: int) -> None:
        """The file is whole: it gets its attributes and its name."""
        entry = self._file
        if entry is None:
            return
        if size_bytes > max(entry.size_bytes, MAX_UNSIZED_BYTES):
            raise Damaged(f"the file server sent more of '{entry.name}' than it said there is")
        try:
            os.ftruncate(self._file_fd, size_bytes)
            self._dress(self._file_fd, entry)
            parent = self._file_parent
            os.rename(self._partial, self._file_name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            self._keep = False
            raise
        else:
            self._partial = b""
        finally:
            self._drop_file()

    def fail(self) -> None:
        """What was begun is not gone on with."""
        self._keep = False
        self._drop_file()

    def _drop_file(self) -> None:
        if self._file is None:
            return
        self._file = None
        os.close(self._file_fd)
        if self._partial and not self._keep:
            _unlink(self._partial, self._file_parent)

    def _mode(self, entry: FileEntry) -> int:
        # On a directory these bits give nobody rights.
        harmless = self._trusted or entry.kind is FileKind.DIRECTORY
        kept = _PERMISSIONS if harmless else _HARMLESS_PERMISSIONS
        if entry.mode & ~kept:
            self.disarmed += 1
        return entry.mode & kept

    def _dress(self, fd: int, entry: FileEntry) -> None:
        # In this order: a change of owner takes set-user-ID bits and capabilities away (chown(2)).
        if self._owners:
            os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, self._mode(entry))
        for name, value in entry.xattrs:
            if not is_kept(name):
                continue
            if name == _CAPABILITY and not self._trusted:
                self.disarmed += 1
                continue
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                    raise
        os.utime(fd, ns=(entry.modified_ns, entry.modified_ns))


def _is_ours(fd: int) -> bool:
    """The name of a partial copy can be guessed: where others may write, one of them may have made it first."""
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()


def _component(name: bytes) -> bytes:
    """One name in a directory. Raises `Damaged` for what could lead out of it."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise Damaged(f"the file server named an object {os.fsdecode(name)!r}")
    return name


def _unlink(name: bytes, parent_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return
