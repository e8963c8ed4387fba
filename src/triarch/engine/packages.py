"""Which packages a tree has and which files are theirs, from the databases of dpkg, apk and rpm.

What these files say was written by a machine: it is read as text and numbers, within bounds, and believed only as far
as to name packages.
"""

from __future__ import annotations

import asyncio
import sqlite3
import struct
import tempfile
from collections.abc import Iterable, Iterator

import msgspec

from triarch.engine.trees import Tree, Trees
from triarch.errors import Exhausted
from triarch.model.driver import Data, EndOfInput, Input, Stream
from triarch.model.file_protocol import FileEntry, FileKind, Frame, FrameReader, decode_data, get_request

_DPKG_STATUS, _DPKG_INFO = b"var/lib/dpkg/status", b"var/lib/dpkg/info/"
_APK = b"lib/apk/db/installed"
_RPM = (b"usr/lib/sysimage/rpm/rpmdb.sqlite", b"var/lib/rpm/rpmdb.sqlite")
_MAX_BYTES = 512 << 20
_MAX_RPM_TAGS = 1 << 16
_MAX_RPM_HEADER_BYTES = 64 << 20
# A row of a real table takes some ten (https://www.sqlite.org/opcode.html).
_MAX_RPM_STEPS = 1_000_000

# rpm's header tags (rpmtag.h), and its types of strings (rpmtd).
_NAME, _VERSION, _RELEASE, _DIRECTORY_INDEXES, _BASE_NAMES, _DIRECTORY_NAMES = 1000, 1001, 1002, 1116, 1117, 1118
_INT32, _STRING, _STRING_ARRAY, _I18N_STRING = 4, 6, 8, 9


class Package(msgspec.Struct, frozen=True, kw_only=True):
    """An installed package. Paths are relative to the root."""

    name: str
    version: str
    files: frozenset[bytes] = frozenset()


async def packages_of(trees: Trees, tree: Tree, entries: dict[bytes, FileEntry]) -> dict[str, Package]:
    """The packages of a tree whose objects are `entries`, by name."""
    wanted = [path for path in (_DPKG_STATUS, _APK, *_RPM) if path in entries]
    if _DPKG_STATUS in entries:
        wanted += [path for path in entries if path.startswith(_DPKG_INFO) and path.endswith(b".list")]
    if not wanted:
        return {}
    contents = await _read(trees, tree, wanted)
    found: list[Package] = []
    if _DPKG_STATUS in contents:
        found += await asyncio.to_thread(parse_dpkg, contents)
    if _APK in contents:
        found += await asyncio.to_thread(parse_apk, contents[_APK])
    for path in _RPM:
        if path in contents:
            found += await asyncio.to_thread(parse_rpm, contents[path])
    moved = _moved_directories(entries)
    return {
        package.name: msgspec.structs.replace(package, files=frozenset(_placed(package.files, moved)))
        for package in found
    }


def owners_of(packages: Iterable[Package]) -> dict[bytes, str]:
    """The package of each path."""
    return {path: package.name for package in packages for path in package.files}


def _moved_directories(entries: dict[bytes, FileEntry]) -> dict[bytes, bytes]:
    """`bin` → `usr/bin` and the like: where the links at the root lead."""
    return {
        path: entry.target.lstrip(b"/")
        for path, entry in entries.items()
        if b"/" not in path and entry.kind is FileKind.SYMLINK
    }


def _placed(files: Iterable[bytes], moved: dict[bytes, bytes]) -> Iterator[bytes]:
    for path in files:
        first, slash, rest = path.partition(b"/")
        yield moved[first] + slash + rest if first in moved else path


# -- the databases


def parse_dpkg(contents: dict[bytes, bytes]) -> list[Package]:
    """What dpkg says is installed (dpkg(1), deb-control(5))."""
    packages = []
    for paragraph in contents[_DPKG_STATUS].decode(errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] not in " \t")
        name, version = fields.get("Package", ""), fields.get("Version", "")
        if not name or not fields.get("Status", "").endswith(" installed"):
            continue
        architecture = fields.get("Architecture", "")
        lists = (f"{name}.list", f"{name}:{architecture}.list")
        texts = [contents[_DPKG_INFO + each.encode()] for each in lists if _DPKG_INFO + each.encode() in contents]
        files = frozenset(line.lstrip(b"/") for text in texts for line in text.splitlines() if line != b"/.")
        packages.append(Package(name=name, version=version, files=files))
    return packages


def parse_apk(content: bytes) -> list[Package]:
    """What apk says is installed (`P:` name, `V:` version, `F:` directory, `R:` file in it; apk-package(5))."""
    packages = []
    for paragraph in content.split(b"\n\n"):
        name = version = ""
        directory, files = b"", set()
        for line in paragraph.splitlines():
            key, value = line[:2], line[2:]
            if key == b"P:":
                name = value.decode(errors="replace")
            elif key == b"V:":
                version = value.decode(errors="replace")
            elif key == b"F:":
                directory = value
            elif key == b"R:":
                files.add(directory + b"/" + value if directory else value)
        if name:
            packages.append(Package(name=name, version=version, files=frozenset(files)))
    return packages


def parse_rpm(content: bytes) -> list[Package]:
    """What rpm says is installed: headers in a table of an sqlite database."""
    packages = []
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        file.write(content)
        file.flush()
        # Not even a journal beside it is read.
        database = sqlite3.connect(f"file:{file.name}?mode=ro&immutable=1", uri=True)
        # What is called a table may be a view that computes without end: a certain amount of work, then no more.
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_RPM_HEADER_BYTES)
        database.set_progress_handler(lambda: True, _MAX_RPM_STEPS)
        try:
            for (blob,) in database.execute("SELECT blob FROM Packages"):
                package = parse_rpm_header(blob) if isinstance(blob, bytes) else None
                if package is not None:
                    packages.append(package)
        except sqlite3.Error:
            return packages
        finally:
            database.close()
    return packages


def parse_rpm_header(blob: bytes) -> Package | None:
    """One package, from a header as rpm stores it: counts, an index of 16 bytes each, and the data they point into."""
    if len(blob) < 8:
        return None
    count, size = struct.unpack_from(">II", blob)
    start = 8 + 16 * count
    if count > _MAX_RPM_TAGS or start + size > len(blob):
        return None
    data = blob[start : start + size]
    index = {}
    for number in range(count):
        tag, kind, offset, length = struct.unpack_from(">IIII", blob, 8 + 16 * number)
        index[tag] = (kind, offset, length)

    def strings(tag: int) -> list[bytes]:
        kind, offset, length = index.get(tag, (0, 0, 0))
        if kind not in (_STRING, _STRING_ARRAY, _I18N_STRING) or offset > len(data) or length > len(data):
            return []
        return data[offset:].split(b"\0", length)[:length]

    def numbers(tag: int) -> tuple[int, ...]:
        kind, offset, length = index.get(tag, (0, 0, 0))
        if kind != _INT32 or offset + 4 * length > len(data):
            return ()
        return struct.unpack_from(f">{length}I", data, offset)

    name, version, release = (b"".join(strings(tag)).decode(errors="replace") for tag in (_NAME, _VERSION, _RELEASE))
    if not name:
        return None
    directories = strings(_DIRECTORY_NAMES)
    pairs = zip(numbers(_DIRECTORY_INDEXES), strings(_BASE_NAMES), strict=False)
    files = frozenset((directories[at] + base).lstrip(b"/") for at, base in pairs if at < len(directories))
    return Package(name=name, version=f"{version}-{release}", files=files)


# -- their files


async def _read(trees: Trees, tree: Tree, paths: list[bytes]) -> dict[bytes, bytes]:
    """The content of files of a tree, in one visit. What cannot be read is left out."""
    collected = _Collected(paths)
    await trees.serve(tree, collected)
    return collected.contents


class _Collected:
    """The far end of a file server that is asked for some files."""

    def __init__(self, paths: list[bytes]) -> None:
        self._requests = b"".join(get_request(b"/" + path) for path in paths)
        self._paths = list(paths)
        self._reader = FrameReader()
        self._now = bytearray()
        self._left = _MAX_BYTES
        self.contents: dict[bytes, bytes] = {}

    async def read(self) -> Input:
        if self._requests:
            data, self._requests = self._requests, b""
            return Data(data)
        return EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self._reader.feed(data)
        for kind, payload in self._reader.frames():
            if kind is Frame.DATA:
                offset, piece = decode_data(payload)
                self._left -= len(piece) + max(0, offset - len(self._now))
                if self._left < 0:
                    raise Exhausted(f"the machine's package database has more than {_MAX_BYTES >> 20} MiB")
                self._now += bytes(max(0, offset - len(self._now)))
                self._now[offset : offset + len(piece)] = piece
            elif kind is Frame.FINISH and self._paths:
                self.contents[self._paths[0]] = bytes(self._now)
            elif kind is Frame.DONE and self._paths:
                self._paths.pop(0)
                self._now.clear()
