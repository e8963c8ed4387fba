"""Templates carry no identity, and the ids of their system users cannot meet those of a machine."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.errors import Invalid
from triarch.model.request import BuildTemplate
from triarch.model.template import Init, Layer, template_digest
from triarch.templates.build import check_request, debian_sources
from triarch.templates.erofs import ErofsWriter
from triarch.templates.ids import MACHINE_IDS, TEMPLATE_IDS, renumber_system_ids
from triarch.templates.image import look_at
from triarch.templates.normalize import normalize, read_text
from triarch.templates.tree import Kind, Node, Tree


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[ErofsWriter]:
    with (tmp_path / "image").open("xb+") as file:
        yield ErofsWriter(file)


def tree_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> Tree:
    tree = Tree()
    for path, content in files.items():
        tree.put(path, content, mode=0o755 if "bin/" in path else 0o644)
    for path, target in (links or {}).items():
        tree.put_node(path, Node(Kind.SYMLINK, mode=0o777, target=target.encode()))
    return tree


def text(tree: Tree, path: str) -> bytes | None:
    node = tree.lookup(tuple(path.encode().split(b"/")))
    if node is None:
        return None
    assert isinstance(node.content, bytes)
    return node.content


DEBIAN = {
    "usr/lib/systemd/systemd": b"elf",
    "usr/sbin/sshd": b"elf",
    "usr/lib/sysusers.d/basic.conf": b"",
    "etc/machine-id": b"0123456789abcdef0123456789abcdef\n",
    "var/lib/dbus/machine-id": b"0123456789abcdef0123456789abcdef\n",
    "etc/hostname": b"builder\n",
    "etc/hosts": b"10.0.0.7 builder\n",
    "etc/fstab": b"UUID=1234 / ext4 defaults 0 1\n",
    "etc/ssh/ssh_host_ed25519_key": b"secret",
    "etc/ssh/ssh_host_ed25519_key.pub": b"public",
    "etc/ssh/sshd_config": b"Port 22\n",
    "var/lib/systemd/random-seed": b"random",
    "var/lib/systemd/credential.secret": b"secret",
    "var/log/dpkg.log": b"2026 install",
    "var/log/apt/history.log": b"Start-Date",
    "var/log/journal/0123456789abcdef0123456789abcdef/system.journal": b"journal",
    "var/lib/apt/lists/deb.debian.org_dists": b"Package: a",
    "var/cache/apt/archives/a_1.deb": b"deb",
    "run/leftover": b"x",
    "dev/leftover": b"x",
    "etc/adduser.conf": b"#FIRST_SYSTEM_UID=100\nLAST_SYSTEM_UID=900\nDSHELL=/bin/sh",
    "etc/login.defs": b"UID_MIN 1000\nSYS_UID_MIN\t\t101\n#SYS_UID_MAX 999\n",
}


def test_no_identity_is_left(writer: ErofsWriter) -> None:
    tree = tree_of(DEBIAN, {"etc/resolv.conf": "/run/systemd/resolve/stub-resolv.conf"})
    normalize(tree, writer)
    for gone in (
        "etc/hostname", "etc/ssh/ssh_host_ed25519_key", "etc/ssh/ssh_host_ed25519_key.pub",
        "var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "run/leftover", "dev/leftover",
        "var/lib/apt/lists/deb.debian.org_dists", "var/cache/apt/archives/a_1.deb",
        "var/log/journal/0123456789abcdef0123456789abcdef",
    ):  # fmt: skip
        assert tree.lookup(tuple(gone.encode().split(b"/"))) is None, gone
    for empty in ("etc/machine-id", "etc/resolv.conf", "var/log/dpkg.log", "var/log/apt/history.log"):
        assert text(tree, empty) == b"", empty
    assert b"builder" not in (text(tree, "etc/hosts") or b"")
    assert b"UUID" not in (text(tree, "etc/fstab") or b"")
    assert text(tree, "etc/ssh/sshd_config") == b"Port 22\n"
    dbus = tree.lookup((b"var", b"lib", b"dbus", b"machine-id"))
    assert dbus is not None and dbus.target == b"/etc/machine-id"
    every = b"".join(node.content for _, node in tree.walk() if isinstance(node.content, bytes))
    assert b"0123456789abcdef" not in every and b"secret" not in every


def test_ssh_keys_are_made_on_the_machine(writer: ErofsWriter) -> None:
    tree = tree_of(DEBIAN)
    normalize(tree, writer)
    unit = tree.find("etc/systemd/system/multi-user.target.wants/triarch-ssh-host-keys.service")
    assert unit is not None and b"ExecStart=/usr/bin/ssh-keygen -A" in read_text(writer, unit)
    without = tree_of({"usr/lib/systemd/systemd": b"elf"})
    normalize(without, writer)
    assert without.find("etc/systemd/system/triarch-ssh-host-keys.service") is None


def test_machines_make_system_users_in_their_own_range(writer: ErofsWriter) -> None:
    tree = tree_of(DEBIAN)
    normalize(tree, writer)
    first = (text(tree, "etc/adduser.conf"), text(tree, "etc/login.defs"))
    assert first[0] is not None and first[1] is not None
    lines = first[0].decode().splitlines()
    assert [line for line in lines if "SYSTEM_UID" in line and not line.startswith("#")] == [
        "FIRST_SYSTEM_UID=500",
        "LAST_SYSTEM_UID=999",
    ]
    assert "DSHELL=/bin/sh" in lines
    assert [line.split() for line in first[1].decode().splitlines() if line.startswith("SYS_UID")] == [
        ["SYS_UID_MIN", "500"],
        ["SYS_UID_MAX", "999"],
    ]
    assert text(tree, "etc/sysusers.d/triarch.conf") == b"r - 500-999\n"
    normalize(tree, writer)
    assert (text(tree, "etc/adduser.conf"), text(tree, "etc/login.defs")) == first


def test_a_bare_tree_gets_what_a_machine_needs(writer: ErofsWriter) -> None:
    tree = tree_of({"app": b"elf"})
    normalize(tree, writer)
    assert set(tree.root.children) == {b"app", b"dev", b"proc", b"sys", b"run", b"tmp", b"etc"}
    assert tree.root.children[b"tmp"].mode == 0o1777
    assert set(tree.root.children[b"etc"].children) == {b"hosts", b"resolv.conf"}


def test_links_of_the_tree_never_lead_elsewhere(writer: ErofsWriter) -> None:
    tree = tree_of({"app": b"elf", "usr/etc/x": b""}, {"etc": "../../usr/etc", "dev": "/etc", "var": "/nowhere"})
    normalize(tree, writer)
    assert text(tree, "usr/etc/hosts") is not None
    assert tree.root.children[b"dev"].kind is Kind.DIRECTORY
    looped = tree_of({"app": b"elf"}, {"etc": "etc"})
    normalize(looped, writer)
    assert text(looped, "etc/hosts") is not None


ACL = struct.pack("<IHHIHHIHHI", 2, 0x02, 7, 998, 0x08, 5, 999, 0x01, 7, 998)


def test_built_system_ids_move_into_the_templates_range() -> None:
    tree = tree_of(
        {
            "etc/passwd": b"root:x:0:0::/:/bin/sh\nmessagebus:x:100:105::/:\nnet:x:998:998::/:\nme:x:1000:1000::/:\n",
            "etc/group": b"root:x:0:\nmessagebus:x:105:\njournal:x:999:a,b\nnet:x:998:\nme:x:1000:\n",
            "file": b"",
        }
    )
    node = tree.root.children[b"file"]
    node.uid, node.gid, node.xattrs = 998, 999, {b"system.posix_acl_access": ACL}
    moved = renumber_system_ids(tree, lambda n: n.content if isinstance(n.content, bytes) else b"")
    assert moved == {998: 101, 999: 102}
    assert (node.uid, node.gid) == (101, 102)
    assert struct.unpack("<IHHIHHIHHI", node.xattrs[b"system.posix_acl_access"])[3::3] == (101, 102, 998)
    assert text(tree, "etc/passwd") == (
        b"root:x:0:0::/:/bin/sh\nmessagebus:x:100:105::/:\nnet:x:101:101::/:\nme:x:1000:1000::/:\n"
    )
    assert text(tree, "etc/group") == b"root:x:0:\nmessagebus:x:105:\njournal:x:102:a,b\nnet:x:101:\nme:x:1000:\n"


def test_ranges_do_not_meet() -> None:
    assert not set(TEMPLATE_IDS) & set(MACHINE_IDS)
    full = b"".join(b"u%d:x:%d:0::/:\n" % (number, number) for number in (*TEMPLATE_IDS, 998))
    tree = tree_of({"etc/passwd": full, "etc/group": b""})
    with pytest.raises(Invalid, match="100 … 499 are full"):
        renumber_system_ids(tree, lambda n: n.content if isinstance(n.content, bytes) else b"")


@pytest.mark.parametrize(
    ("files", "links", "init"),
    [
        ({"usr/lib/systemd/systemd": b"", "usr/sbin/x": b""}, {"sbin": "usr/sbin"}, Init.APP),
        ({"sbin/init": b""}, {}, Init.SYSTEM),
        ({"bin/busybox": b""}, {"sbin/init": "/bin/busybox"}, Init.APP),
        ({"bin/busybox": b"", "sbin/openrc": b""}, {"sbin/init": "/bin/busybox"}, Init.SYSTEM),
        ({"bin/sh": b""}, {"sbin/init": "../../../../sbin/init"}, Init.APP),
        ({"app": b""}, {}, Init.APP),
    ],
)
def test_init_kind(writer: ErofsWriter, files: dict[str, bytes], links: dict[str, str], init: Init) -> None:
    assert look_at(tree_of(files, links), writer).init is init


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b'NAME="Debian GNU/Linux"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n', "Debian GNU/Linux 12 (bookworm)"),
        (b"NAME=Alpine\n", "Alpine"),
        (b"PRETTY_NAME='unbalanced\nNAME=Fallback\n", "Fallback"),
        (b'PRETTY_NAME="$(reboot) \x1b[31m`x`"\n', "$(reboot) [31m`x`"),
        (b"PRETTY_NAME=" + b"x" * 300, "x" * 100),
        (b"\xff\xfe\0", ""),
    ],
)
def test_os_name_is_parsed_and_never_run(writer: ErofsWriter, content: bytes, name: str) -> None:
    tree = tree_of({"usr/lib/os-release": content}, {"etc/os-release": "../usr/lib/os-release"})
    assert look_at(tree, writer).os_name == name


@pytest.mark.parametrize(
    "request_",
    [
        BuildTemplate(name="x", suite="bookworm; rm"),
        BuildTemplate(name="x", suite="-o"),
        BuildTemplate(name="x", packages=("nginx,apache2",)),
        BuildTemplate(name="x", packages=("--help",)),
        BuildTemplate(name="x", packages=("?priority(required)",)),
        BuildTemplate(name="x", mirror="file:///etc"),
        BuildTemplate(name="x", mirror="http://a b"),
        BuildTemplate(name="../x"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_right(request_: BuildTemplate) -> None:
    with pytest.raises(Invalid):
        check_request(request_)


def test_sources_are_the_public_archive() -> None:
    text = debian_sources("bookworm")
    assert "URIs: http://deb.debian.org/debian\nSuites: bookworm bookworm-updates\n" in text
    assert "URIs: http://deb.debian.org/debian-security\nSuites: bookworm-security\n" in text
    assert "security" not in debian_sources("sid")


def test_template_digest_depends_on_layers_and_their_order() -> None:
    a, b = Layer(digest="a" * 64, size_bytes=1), Layer(digest="b" * 64, size_bytes=1)
    digests = {template_digest(layers) for layers in ((a,), (b,), (a, b), (b, a), (a, a))}
    assert len(digests) == 5
    assert all(len(digest) == 64 for digest in digests)
