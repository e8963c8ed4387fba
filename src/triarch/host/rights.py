"""What this process may do on this host.

The kernel asks for capabilities (capabilities(7)) and for mapped ids (user_namespaces(7)). Being user 0 proves neither:
root of a locked-down container has few of the first, root of a user namespace few of the second.
"""

from __future__ import annotations

import fcntl
import os
import re
from enum import IntEnum
from pathlib import Path

import msgspec

_HOST_ID_COUNT = 2**32 - 1
_NS_GET_USERNS = 0xB701


class Capability(IntEnum):
    """Those that Triarch has a use for, as <linux/capability.h> numbers them."""

    CAP_CHOWN = 0
    CAP_DAC_OVERRIDE = 1
    CAP_FOWNER = 3
    CAP_KILL = 5
    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_NET_ADMIN = 12
    CAP_SYS_CHROOT = 18
    CAP_SYS_ADMIN = 21
    CAP_SYS_RESOURCE = 24


# For mounts, bridges and namespaces, and for becoming a machine's root in them.
_ADMINISTRATION_NEEDS = (
    Capability.CAP_SYS_ADMIN,
    Capability.CAP_NET_ADMIN,
    Capability.CAP_SETUID,
    Capability.CAP_SETGID,
)
# To start a program as another user, to hand it files, and to end it.
_OTHER_USERS_NEED = (Capability.CAP_CHOWN, Capability.CAP_SETUID, Capability.CAP_SETGID, Capability.CAP_KILL)
# To install packages into a tree as its root.
_CHROOT_NEEDS = (
    Capability.CAP_CHOWN,
    Capability.CAP_DAC_OVERRIDE,
    Capability.CAP_FOWNER,
    Capability.CAP_SETUID,
    Capability.CAP_SETGID,
    Capability.CAP_SYS_CHROOT,
)
_CHROOT_ID_COUNT = 65_536


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in the way, as half a sentence, and what would help."""

    reason: str
    remedy: str


class Rights(msgspec.Struct, frozen=True, kw_only=True):
    """`capabilities` is the effective set as a bit mask; `id_count` tells how many user ids exist for this process.

    `own_network`: whether capabilities count in the network namespace that this process is in.
    """

    user_id: int
    capabilities: int
    id_count: int
    own_network: bool = True

    def has(self, capability: Capability) -> bool:
        return bool(self.capabilities >> capability & 1)

    def lacks(self, *wanted: Capability) -> tuple[str, ...]:
        """The names of those that are missing."""
        return tuple(capability.name for capability in wanted if not self.has(capability))

    @property
    def host_ids(self) -> bool:
        """Whether ids are the host's own, all of them: root of a user namespace is not root."""
        return self.id_count >= _HOST_ID_COUNT

    @property
    def obstacle(self) -> Obstacle | None:
        """What keeps this process from administering the host: mounts, bridges, namespaces. None where nothing does."""
        if self.user_id != 0:
            return Obstacle(reason=f"user {self.user_id} is not root", remedy="run triarch as root")
        if not self.host_ids:
            return Obstacle(
                reason="this is root of a user namespace, not of the host",
                remedy="run triarch on the host itself, or in a privileged container",
            )
        if missing := self.lacks(*_ADMINISTRATION_NEEDS):
            return Obstacle(
                reason=f"this is root without {', '.join(missing)}",
                remedy="give the container that this is in these capabilities (--privileged)",
            )
        return None

    @property
    def other_users(self) -> bool:
        """Whether a program can be started as any user, so that machines run apart from us and from each other."""
        return self.host_ids and not self.lacks(*_OTHER_USERS_NEED)

    @property
    def networks(self) -> bool:
        """Whether interfaces and packet filters can be looked at and made."""
        return self.own_network and self.has(Capability.CAP_NET_ADMIN)

    @property
    def chroot(self) -> bool:
        """Whether packages can be installed into a tree as its root."""
        return self.user_id == 0 and self.id_count >= _CHROOT_ID_COUNT and not self.lacks(*_CHROOT_NEEDS)


def rights() -> Rights:
    """Of this process, asked anew; none where /proc does not tell."""
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text("/proc/self/status"), re.MULTILINE)
    return Rights(
        user_id=os.geteuid(),
        capabilities=int(effective[1], 16) if effective else 0,
        id_count=mapped_ids(_text("/proc/self/uid_map")),
        own_network=_owns_network(),
    )


def _owns_network() -> bool:
    """Whether our user namespace is the owner of our network namespace, or above it (ioctl_ns(2))."""
    try:
        fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(fd, _NS_GET_USERNS))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def mapped_ids(uid_map: str) -> int:
    """How many ids the text of a `/proc/PID/uid_map` maps."""
    return sum(int(line.split()[2]) for line in uid_map.splitlines())


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
