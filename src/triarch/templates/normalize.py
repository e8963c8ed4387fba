"""What every tree goes through before it becomes a template: no identity, nothing of the host that made it.

A template carries no identity (RECIPES-patch, rule 38). What makes a machine itself is made at its first start and then
lives in its delta, under whatever architecture:

- `/etc/machine-id` is an empty file: PID 1 of systemd writes a new id into it, and because it exists no "first boot"
  with its questions and presets takes place (machine-id(5));
- ssh host keys are made by a unit of ours, where the tree has sshd and systemd;
- `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` say nothing: drivers give a machine its name and its resolver.
"""

from __future__ import annotations

from fnmatch import fnmatch

from triarch.templates.erofs import ErofsWriter
from triarch.templates.ids import file_at, reserve_machine_ids
from triarch.templates.tree import Kind, Node, Tree, directory

MAX_TEXT_BYTES = 1 << 20

_HOSTS = b"""127.0.0.1\tlocalhost
::1\t\tlocalhost ip6-localhost ip6-loopback
ff02::1\t\tip6-allnodes
ff02::2\t\tip6-allrouters
"""
_FSTAB = b"# The root filesystem is assembled by Triarch before init runs.\n"
_SSH_KEYS_UNIT = b"""[Unit]
Description=Make this machine's own ssh host keys
ConditionPathExists=!/etc/ssh/ssh_host_ed25519_key
Before=ssh.service sshd.service ssh.socket sshd.socket

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
"""
_SSH_KEYS_NAME = "triarch-ssh-host-keys.service"

# Directory, then the names in it that go (shell patterns).
_REMOVED = (
    ("", ".dockerenv"),
    ("etc", "hostname"),
    ("etc/ssh", "ssh_host_*"),
    ("etc/udev/rules.d", "70-persistent-*.rules"),
    ("root", ".bash_history"),
    ("var/lib/systemd", "random-seed"),
    ("var/lib/systemd", "credential.secret"),
    ("var/lib/systemd/timesync", "*"),
    ("var/lib/urandom", "random-seed"),
    ("var/lib", "random-seed"),
    ("var/lib/dhcp", "*.leases"),
    ("var/lib/NetworkManager", "*"),
    ("var/lib/cloud", "*"),
    ("var/lib/apt/lists", "*"),
    ("var/cache/apt", "*.bin"),
    ("var/cache/apt/archives", "*.deb"),
    ("var/cache/ldconfig", "*"),
    ("var/log/journal", "*"),
)
# Filled by the machine at every start.
_EMPTIED = ("dev", "proc", "sys", "run")


def read_text(writer: ErofsWriter, node: Node) -> bytes:
    """The content of a small file of the tree; what is beyond 1 MiB is left out."""
    return node.content if isinstance(node.content, bytes) else writer.read(node.content, MAX_TEXT_BYTES)


def normalize(tree: Tree, writer: ErofsWriter) -> None:
    """Take every identity out of the tree and give it what a machine needs to stand on. Idempotent."""
    for name in _EMPTIED:
        old = tree.root.children.get(name.encode())
        tree.root.children[name.encode()] = directory(mtime_ns=old.mtime_ns if old else 0)
    if tree.root.children.get(b"tmp") is None:
        tree.root.children[b"tmp"] = directory(0o1777)
    for place, pattern in _REMOVED:
        _remove_matching(tree, place, pattern)
    _empty_logs(tree)
    tree.put("etc/hosts", _HOSTS)
    tree.put("etc/resolv.conf", b"")
    if file_at(tree, "etc/fstab") is not None:
        tree.put("etc/fstab", _FSTAB)
    _forget_machine_id(tree)
    _make_ssh_keys_at_first_start(tree)
    reserve_machine_ids(tree, lambda node: read_text(writer, node))


def _remove_matching(tree: Tree, place: str, pattern: str) -> None:
    node = tree.find(place) if place else tree.root
    if node is not None:
        for name in [name for name in node.children if fnmatch(name.decode(errors="replace"), pattern)]:
            del node.children[name]


def _empty_logs(tree: Tree) -> None:
    """Log files stay, with their owners and modes, because daemons expect them; what they say goes."""
    pending = [tree.find("var/log")]
    while pending:
        node = pending.pop()
        if node is not None and node.kind is Kind.FILE:
            node.content = b""
        elif node is not None:
            pending += node.children.values()


def _forget_machine_id(tree: Tree) -> None:
    if tree.lookup((b"etc", b"machine-id")) is not None or tree.find("usr/lib/systemd/systemd") is not None:
        tree.put("etc/machine-id", b"", mode=0o444)
    old = tree.find("var/lib/dbus")
    if old is not None and b"machine-id" in old.children:
        old.children[b"machine-id"] = Node(Kind.SYMLINK, mode=0o777, target=b"/etc/machine-id")


def _make_ssh_keys_at_first_start(tree: Tree) -> None:
    if tree.find("usr/sbin/sshd") is None or tree.find("usr/lib/systemd/systemd") is None:
        return
    tree.put(f"etc/systemd/system/{_SSH_KEYS_NAME}", _SSH_KEYS_UNIT)
    wanted = Node(Kind.SYMLINK, mode=0o777, target=f"/etc/systemd/system/{_SSH_KEYS_NAME}".encode())
    tree.put_node(f"etc/systemd/system/multi-user.target.wants/{_SSH_KEYS_NAME}", wanted)
