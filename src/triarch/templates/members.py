"""From the members of a tar archive to a tree: the border where hostile archives are refused."""

from __future__ import annotations

import msgspec

from triarch.errors import Invalid
from triarch.templates.erofs import MAX_XATTR_BYTES, ErofsWriter, split_xattr_name
from triarch.templates.tar import Member, TarReader, Type
from triarch.templates.tree import MAX_IDS, MAX_PATH_BYTES, Kind, Node, Tree, show, split

_KINDS = {
    Type.FILE: Kind.FILE,
    Type.DIRECTORY: Kind.DIRECTORY,
    Type.SYMLINK: Kind.SYMLINK,
    Type.FIFO: Kind.FIFO,
}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How large a tree may be. `total_bytes` counts all content unpacked, holes of sparse files too.

    `ratio` bounds unpacked to packed bytes once more than `ratio_from_bytes` are unpacked; real systems compress to
    a third or a tenth. `metadata_bytes` bounds names, link targets and extended attributes, which stay in memory.
    """

    total_bytes: int = 64 << 30
    names: int = 1_000_000
    metadata_bytes: int = 256 << 20
    ratio: int = 200
    ratio_from_bytes: int = 256 << 20


def load_tree(reader: TarReader, writer: ErofsWriter, limits: Limits) -> Tree:
    """Judge every member, put its content into the image and its metadata into the tree that is returned.

    Refused with `Invalid`, naming the member: names and hard links out of the tree, members below a symlink out of it,
    device nodes (what is in `/dev` is dropped instead), overlay whiteouts and attributes, ids above 65,535, and what
    exceeds `limits`. The last of several members with one name counts, as with tar.
    """
    tree = Tree()
    total_bytes = metadata_bytes = 0
    for member in reader:
        path = split(member.name)
        _refuse_devices(member, path)
        if path[:1] == (b"dev",) and len(path) > 1:
            continue
        total_bytes += member.size_bytes if member.type is Type.FILE else 0
        if total_bytes > limits.total_bytes:
            raise Invalid(
                f"the archive holds more than {limits.total_bytes} bytes with member {show(path)}: "
                f"that is the limit for a template"
            )
        metadata_bytes += len(member.name) + len(member.link) + sum(map(len, member.xattrs.values()))
        if metadata_bytes > limits.metadata_bytes:
            raise Invalid(f"names and attributes up to member {show(path)} exceed {limits.metadata_bytes} bytes")
        if member.type is Type.HARD_LINK:
            tree.insert(path, _linked(tree, member))
        else:
            node = _node(member)
            # Placed before its content is read: a name that is refused costs nothing.
            tree.insert(path, node)
            if member.type is Type.FILE:
                node.content = writer.content(member.size_bytes, reader.content())
        if tree.names > limits.names:
            raise Invalid(f"the archive holds more than {limits.names} names with member {show(path)}")
    return tree


def _refuse_devices(member: Member, path: tuple[bytes, ...]) -> None:
    if member.type not in (Type.CHARACTER_DEVICE, Type.BLOCK_DEVICE):
        return
    if member.type is Type.CHARACTER_DEVICE and member.major == member.minor == 0:
        raise Invalid(f"member {show(path)} is an overlay whiteout (character device 0/0)")
    if path[:1] != (b"dev",):
        raise Invalid(
            f"member {show(path)} is a {member.type.value} ({member.major}/{member.minor}); "
            f"a template may hold devices in /dev only, where they are dropped"
        )


def _linked(tree: Tree, member: Member) -> Node:
    path, target = split(member.name), split(member.link)
    found = tree.resolve(target[:-1], strict=True)
    node = None if found is None or not target else found[1].children.get(target[-1])
    if node is None:
        raise Invalid(
            f"member {show(path)} is a hard link to {show(target)}, which the archive did not bring before it"
        )
    if node.kind is Kind.DIRECTORY:
        raise Invalid(f"member {show(path)} is a hard link to the directory {show(target)}")
    return node


def _node(member: Member) -> Node:
    name = show(member.name)
    if not (0 <= member.uid < MAX_IDS and 0 <= member.gid < MAX_IDS):
        raise Invalid(f"member {name} belongs to {member.uid}:{member.gid}; ids in a template end at {MAX_IDS - 1}")
    if member.type is Type.SYMLINK and (not 0 < len(member.link) <= MAX_PATH_BYTES or b"\0" in member.link):
        raise Invalid(f"member {name} is a symlink with an impossible target")
    _check_xattrs(member)
    return Node(
        _KINDS[member.type],
        mode=0o777 if member.type is Type.SYMLINK else member.mode,
        uid=member.uid,
        gid=member.gid,
        mtime_ns=member.mtime_ns,
        xattrs=member.xattrs,
        target=member.link if member.type is Type.SYMLINK else b"",
    )


def _check_xattrs(member: Member) -> None:
    name = show(member.name)
    for key, value in member.xattrs.items():
        if key.startswith(b"trusted.") or b".overlay." in key:
            raise Invalid(f"member {name} has the extended attribute {show(key)}, which no template may bring")
        try:
            split_xattr_name(key)
        except Invalid as error:
            raise Invalid(f"member {name}: {error.message}") from error
        if len(value) > MAX_XATTR_BYTES:
            raise Invalid(
                f"member {name} has an extended attribute of {len(value)} bytes; Linux allows {MAX_XATTR_BYTES}"
            )
    if sum(len(key) + len(value) + 8 for key, value in member.xattrs.items()) > MAX_XATTR_BYTES:
        raise Invalid(f"member {name} has extended attributes of more than {MAX_XATTR_BYTES} bytes")
