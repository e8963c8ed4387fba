"""A file tree in memory: names, metadata and where the content of each file lies in the image that is being written.

Nothing of a template is ever unpacked on the host. A tar archive becomes this tree, normalization edits it, and the
EROFS writer puts it behind the content; so no name, link or device of a hostile archive can reach outside, and a plain
user gets the same image as root.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from triarch.errors import Invalid

Path = tuple[bytes, ...]
"""A place in the tree, one name per element; () is the root."""

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
MAX_IDS = 65536
_MAX_LINKS_FOLLOWED = 40


class Kind(Enum):
    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"
    FIFO = "fifo"


@dataclass(frozen=True, slots=True)
class Extent:
    """`size_bytes` of content that start at block `first_block` of the image (4,096 bytes each)."""

    first_block: int
    size_bytes: int


@dataclass(slots=True, eq=False)
class Node:
    """One inode. The same node under two names is a hard link. `content` is a file's; `target` a symlink's."""

    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    content: Extent | bytes = b""
    target: bytes = b""
    children: dict[bytes, Node] = field(default_factory=dict)


def directory(mode: int = 0o755, mtime_ns: int = 0) -> Node:
    return Node(Kind.DIRECTORY, mode=mode, mtime_ns=mtime_ns)


def show(path: Path | bytes) -> str:
    """A name for messages: printable, quoted, and cut when it is absurdly long."""
    text = path if isinstance(path, bytes) else b"/".join(path)
    return "'" + text[:200].decode(errors="backslashreplace").encode("unicode_escape").decode() + "'"


def split(name: bytes) -> Path:
    """The place that a relative name means. Raises `Invalid` for a name that leads out of the tree or cannot exist."""
    if name.startswith(b"/"):
        raise Invalid(f"the name {show(name)} is absolute")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise Invalid(f"the name {show(name)} leads out of the tree with '..'")
    if b"\0" in name:
        raise Invalid(f"the name {show(name)} holds a NUL byte")
    if len(name) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in parts):
        raise Invalid(
            f"the name {show(name)} is longer than Linux allows ({MAX_NAME_BYTES} bytes, {MAX_PATH_BYTES} in all)"
        )
    return parts


class Tree:
    """The root directory and what lies below it. Links are followed inside the tree only, as after a chroot."""

    def __init__(self) -> None:
        self.root = directory()
        self.names = 0
        """How many names members have brought, those of implied parents included."""

    def lookup(self, path: Path) -> Node | None:
        """The node at a place; symlinks are not followed, not even on the way."""
        node: Node | None = self.root
        for name in path:
            node = None if node is None else node.children.get(name)
        return node

    def resolve(self, path: Path, *, strict: bool = False) -> tuple[Path, Node] | None:
        """The node at a place after following every symlink, and where it really is; None when there is none.

        With `strict`, a symlink that would lead out of a tree lying anywhere but at `/` raises `Invalid`.
        """
        pending: list[bytes] = list(reversed(path))
        trail: list[tuple[bytes, Node]] = [(b"", self.root)]
        followed = 0
        while pending:
            name = pending.pop()
            if name == b"..":
                if strict and len(trail) == 1:
                    raise Invalid(f"the name {show(path)} lies below a symlink that leads out of the tree")
                del trail[max(1, len(trail) - 1) :]
                continue
            node = trail[-1][1].children.get(name)
            if node is None or followed > _MAX_LINKS_FOLLOWED:
                return None
            if node.kind is not Kind.SYMLINK:
                trail.append((name, node))
                continue
            followed += 1
            if node.target.startswith(b"/"):
                if strict:
                    raise Invalid(f"the name {show(path)} lies below a symlink out of the tree, to {show(node.target)}")
                del trail[1:]
            pending += [part for part in reversed(node.target.split(b"/")) if part not in (b"", b".")]
        return tuple(name for name, _ in trail[1:]), trail[-1][1]

    def find(self, path: str) -> Node | None:
        """`resolve` for a path that the code knows, such as `etc/passwd`."""
        found = self.resolve(tuple(path.encode().split(b"/")))
        return None if found is None else found[1]

    def parent_of(self, path: Path) -> Node:
        """The directory that is to hold a new member, made where it is missing.

        A parent that is a symlink is followed when it is relative and stays in the tree (`lib -> usr/lib`). Raises
        `Invalid` when it leads out of the tree, or when a parent is no directory.
        """
        node = self.root
        place: Path = ()
        for name in path[:-1]:
            if name not in node.children:
                node.children[name] = directory()
                self.names += 1
            child = node.children[name]
            place = (*place, name)
            if child.kind is Kind.SYMLINK:
                found = self.resolve(place, strict=True)
                if found is None:
                    raise Invalid(
                        f"the name {show(path)} lies below a symlink to {show(child.target)}, which is not there"
                    )
                place, child = found
            if child.kind is not Kind.DIRECTORY:
                raise Invalid(f"the name {show(path)} lies below a {child.kind.value}")
            node = child
        return node

    def insert(self, path: Path, node: Node) -> None:
        """Put a node at a place. The last one of several with one name counts; directories are merged.

        Raises `Invalid` where the node would replace a directory that is not empty, or the root.
        """
        if not path:
            if node.kind is not Kind.DIRECTORY:
                raise Invalid(f"the root of the tree is a {node.kind.value} instead of a directory")
            node.children, self.root = self.root.children, node
            return
        parent = self.parent_of(path)
        old = parent.children.get(path[-1])
        if old is not None and old.kind is Kind.DIRECTORY:
            if node.kind is Kind.DIRECTORY:
                node.children = old.children
            elif old.children:
                raise Invalid(f"the {node.kind.value} {show(path)} would replace a directory that is not empty")
        parent.children[path[-1]] = node
        self.names += old is None

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> Node:
        """Put root's file at a path that the code knows. Symlinks on the way are followed, one at its end replaced."""
        node = Node(Kind.FILE, mode=mode, content=content)
        self.put_node(path, node)
        return node

    def put_node(self, path: str, node: Node) -> None:
        """As `put`, for any node. What was there before is gone, a whole directory too."""
        *above, name = path.encode().split(b"/")
        self.make_directory(b"/".join(above).decode()).children[name] = node

    def make_directory(self, path: str) -> Node:
        """The directory at a path that the code knows, made (0755, root) where it or a part of it is missing."""
        node = self.root
        place: Path = ()
        for name in path.encode().split(b"/") if path else ():
            found = self.resolve((*place, name))
            if found is None or found[1].kind is not Kind.DIRECTORY:
                child = directory()
                node.children[name] = child
                found = ((*place, name), child)
            place, node = found
        return node

    def remove(self, path: str) -> None:
        """Remove what a path that the code knows names, with all below it; absent is success."""
        above, _, name = path.rpartition("/")
        parent = self.root if not above else self.find(above)
        if parent is not None:
            parent.children.pop(name.encode(), None)

    def walk(self) -> Iterator[tuple[Path, Node]]:
        """Every name with its node, the root first, a directory before what it holds, siblings in byte order."""
        pending: list[tuple[Path, Node]] = [((), self.root)]
        while pending:
            path, node = pending.pop()
            yield path, node
            pending += [((*path, name), node.children[name]) for name in sorted(node.children, reverse=True)]
