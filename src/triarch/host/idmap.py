"""User namespaces with a range of host ids of their own, and mounts that show files through them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triarch.host.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    attach_tree,
    clone_tree,
    raise_capabilities,
    set_filesystem_ids,
    set_idmap,
    unshare,
)


@dataclass(frozen=True, slots=True)
class NamespacePair:
    """Descriptors (close-on-exec) of a user namespace and of a network namespace that it owns."""

    user_fd: int
    network_fd: int


class NamespaceMaker:
    """Makes both namespaces in a child of its own, beside whatever else has to be done meanwhile.

    One unshare(2) for both: a network namespace owned by the host's user namespace would refuse ping inside.
    """

    def __init__(self) -> None:
        self._ready_fd, ready_write = os.pipe()
        done_read, self._done_fd = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _hold_namespaces(ready_write, done_read, self._done_fd)
        os.close(ready_write)
        os.close(done_read)

    def finish(self, base: int, count: int) -> NamespacePair:
        """Ids 0 … count-1 inside are `base` … outside, and nothing else is mapped.

        Never add a second map line for host id 0: setuid to it inside would open every file of the host's root.
        """
        try:
            number = int.from_bytes(os.read(self._ready_fd, 4), "little")
            if number:
                raise OSError(number, f"make a user namespace: {os.strerror(number)}")
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{self._pid}/{name}").write_text(f"0 {base} {count}\n")
            flags = os.O_RDONLY | os.O_CLOEXEC
            user_fd = os.open(f"/proc/{self._pid}/ns/user", flags)
            return NamespacePair(user_fd, os.open(f"/proc/{self._pid}/ns/net", flags))
        finally:
            os.close(self._ready_fd)
            os.close(self._done_fd)
            os.waitpid(self._pid, 0)


def _hold_namespaces(ready_write: int, done_read: int, done_write: int) -> None:
    """The child: enter new namespaces, say so (an errno, 0 for success), wait until the parent has opened them."""
    number = 0
    try:
        os.close(done_write)
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNET)
        except OSError as error:
            number = error.errno or 0
        os.write(ready_write, number.to_bytes(4, "little"))
        os.read(done_read, 1)
    finally:
        os._exit(0)


def attach_mapped(source: str, target: str, user_namespace_fd: int) -> None:
    """Attach a copy of the mount `source` at `target` that shows its files with a namespace's ids, disk unchanged."""
    tree_fd = clone_tree(source)
    try:
        set_idmap(tree_fd, user_namespace_fd)
        attach_tree(tree_fd, target)
    finally:
        os.close(tree_fd)


@contextmanager
def filesystem_ids(base: int) -> Iterator[None]:
    """Within, files and mounts are made as host id `base`, with every capability.

    An overlay acts with its mounter's ids: ones that the lower mounts do not map make it read-only without a word.
    """
    set_filesystem_ids(base, base)
    try:
        raise_capabilities()
        yield
    finally:
        set_filesystem_ids(0, 0)
