"""System call filters: Podman's profile, resolved for a set of capabilities, stricter in places, compiled once.

crun spends 13 ms of each start on compiling the profile. It leaves the result beside its state, so that the first start
can keep it and later ones hand it over as an annotation.
"""

from __future__ import annotations

import base64
import hashlib
import os
import platform
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from triarch.errors import Unavailable

PROFILE_PATHS = (Path("/etc/containers/seccomp.json"), Path("/usr/share/containers/seccomp.json"))

# Refused to every machine, whatever it may do otherwise: interfaces to the whole kernel with a history of escapes.
NEVER_ALLOWED = frozenset(
    [
        "bpf",
        "perf_event_open",
        "fanotify_init",
        "lookup_dcookie",
        "quotactl",
        "quotactl_fd",
        "open_by_handle_at",
        "userfaultfd",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "kexec_load",
        "kexec_file_load",
        "init_module",
        "finit_module",
        "delete_module",
        "acct",
        "swapon",
        "swapoff",
    ]
)

# `uname -m` → name in the profile's conditions, architectures of the filter.
_ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86_64": ("amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")),
    "aarch64": ("arm64", ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM")),
}
_EPERM = 1
_MAX_FILTER_BYTES = 1 << 16


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """When a rule of the profile counts: any of `caps`, any of `arches`, at least `minKernel`."""

    caps: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()
    minKernel: str | None = None  # noqa: N815 — the profile's own spelling


class Argument(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    index: int
    value: int
    value_two: int = 0
    op: str


class ProfileRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    action: str
    names: tuple[str, ...] = ()
    args: tuple[Argument, ...] | None = None
    errno_ret: int | None = None
    includes: Condition = Condition()
    excludes: Condition = Condition()


class Profile(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A seccomp.json as Podman and Docker have it."""

    default_action: str
    default_errno_ret: int | None = None
    syscalls: tuple[ProfileRule, ...]


class Rule(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    names: tuple[str, ...]
    action: str
    args: tuple[Argument, ...] | None = None
    errno_ret: int | None = None


class Seccomp(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """`linux.seccomp` of an OCI configuration: nothing conditional is left."""

    default_action: str
    architectures: tuple[str, ...]
    syscalls: tuple[Rule, ...]
    default_errno_ret: int | None = None


def load_profile() -> Profile:
    """The host's own profile, else the distribution's. Raises `Unavailable` when there is none."""
    for path in PROFILE_PATHS:
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=Profile)
    raise Unavailable(
        f"there is no seccomp profile {PROFILE_PATHS[-1]}",
        hint="apt-get install golang-github-containers-common",
    )


def resolve(
    profile: Profile, capabilities: tuple[str, ...], machine: str = platform.machine(), kernel: str = platform.release()
) -> Seccomp:
    """What the profile says for these capabilities on this processor and kernel (pure), less what is never allowed."""
    arch, filters = _ARCHITECTURES.get(machine, (machine, ()))
    rules = [Rule(names=tuple(sorted(NEVER_ALLOWED)), action="SCMP_ACT_ERRNO", errno_ret=_EPERM)]
    for rule in profile.syscalls:
        names = tuple(name for name in rule.names if name not in NEVER_ALLOWED)
        if names and _counts(rule, frozenset(capabilities), arch, kernel):
            rules.append(Rule(names=names, action=rule.action, args=rule.args or None, errno_ret=rule.errno_ret))
    return Seccomp(
        default_action=profile.default_action,
        default_errno_ret=profile.default_errno_ret,
        architectures=filters,
        syscalls=tuple(rules),
    )


def _counts(rule: ProfileRule, capabilities: frozenset[str], arch: str, kernel: str) -> bool:
    wanted, unwanted = rule.includes, rule.excludes
    if wanted.arches and arch not in wanted.arches:
        return False
    if arch in unwanted.arches:
        return False
    if wanted.caps and not capabilities & set(wanted.caps):
        return False
    if wanted.minKernel is not None and _version(kernel) < _version(wanted.minKernel):
        return False
    return not capabilities & set(unwanted.caps)


def _version(text: str) -> tuple[int, int]:
    digits = [int("".join(c for c in part if c.isdigit()) or 0) for part in text.split(".")[:2]]
    return (digits[0], digits[1] if len(digits) > 1 else 0)


class FilterCache:
    """Compiled filters, as base64 text, under a name that changes with whatever made them."""

    def __init__(self, directory: Path, runtime_version: str) -> None:
        self._directory = directory
        self._made_by = f"{runtime_version}\n{platform.release()}\n{platform.machine()}"
        self._known: dict[str, str] = {}

    def get(self, seccomp: Seccomp) -> str | None:
        """The compiled filter, or None when no machine has been started with it yet."""
        key = self._key(seccomp)
        if key not in self._known:
            try:
                self._known[key] = base64.b64encode(self._read(key)).decode()
            except OSError:
                return None
        return self._known[key]

    def keep(self, seccomp: Seccomp, compiled: Path) -> None:
        """Remember what the runtime compiled. A cache that cannot be written only costs time."""
        try:
            program = compiled.read_bytes()
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=self._directory, delete=False) as file:
                file.write(program)
            os.replace(file.name, self._directory / self._key(seccomp))  # noqa: PTH105
        except OSError:
            return

    def _read(self, key: str) -> bytes:
        """Only from a file that nobody but us could have written."""
        with (self._directory / key).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not 0 < status.st_size <= _MAX_FILTER_BYTES:
                raise PermissionError(f"{file.name} is not ours alone")
            return file.read()

    def _key(self, seccomp: Seccomp) -> str:
        text = self._made_by.encode() + b"\n" + msgspec.json.encode(seccomp)
        return f"seccomp-{hashlib.sha256(text).hexdigest()}.bpf"
