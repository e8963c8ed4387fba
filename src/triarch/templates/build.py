"""Building Debian trees with mmdebstrap."""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from triarch.errors import CommandFailed, Error, Exhausted, Failed, Invalid, Unavailable
from triarch.host.facts import subordinate_ids_error
from triarch.host.files import free_space_bytes
from triarch.host.process import find_program, run_async
from triarch.host.rights import rights
from triarch.model.names import check_template_name
from triarch.model.operation import Progress
from triarch.model.request import BuildTemplate
from triarch.model.resources import format_size
from triarch.model.template import Init
from triarch.templates.erofs import ErofsWriter
from triarch.templates.ids import renumber_system_ids
from triarch.templates.image import Report, TreeDraft, make_image
from triarch.templates.members import Limits
from triarch.templates.normalize import read_text
from triarch.templates.tree import Tree

PUBLIC_MIRROR = "http://deb.debian.org/debian"
PUBLIC_SECURITY_MIRROR = "http://deb.debian.org/debian-security"

# Besides Essential: yes and apt. udev makes the serial console's getty start in a VM; containers skip it.
_SYSTEM_PACKAGES = (
    "ca-certificates", "dbus", "iproute2", "iputils-ping", "kmod", "netbase", "procps", "systemd", "systemd-sysv",
    "tzdata", "udev",
)  # fmt: skip
_APP_PACKAGES = ("ca-certificates", "netbase", "tzdata")

# Not for what a machine installs later: the configuration that mmdebstrap leaves is removed from the tree.
_DPKG_OPTIONS = (
    "force-unsafe-io",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
)

# What mmdebstrap says, and which part of the work lies behind it by then.
_PHASES = (
    ("running apt-get update", 0.02, "reading the package lists"),
    ("downloading packages", 0.10, "downloading packages"),
    ("extracting archives", 0.25, "unpacking the base system"),
    ("installing essential", 0.35, "installing the base system"),
    ("installing remaining", 0.55, "installing packages"),
    ("cleaning package lists", 0.85, "cleaning up"),
    ("creating tarball", 0.87, "collecting the tree"),
)
_PACK_FROM = 0.90

_SUITE = re.compile(r"[a-z][a-z0-9-]{0,40}\Z")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9-]+)?(=[A-Za-z0-9.+~:-]+)?\Z")
_MIRROR = re.compile(r"https?://[A-Za-z0-9._~:/%@\[\]-]+\Z")
_ROLLING = ("sid", "unstable")

# mmdebstrap keeps the unpacked tree, its packages, the archive and the image at once.
_NEEDED_BYTES = 1 << 30
_MIRROR_TIMEOUT_SECONDS = 15
_TRIAL_SECONDS = 10.0


async def build_tree(request: BuildTemplate, workspace: Path, progress: Report) -> TreeDraft:
    """Build `request.suite` in `workspace` and make an image of it.

    Works as root, and without its rights where there are subordinate ids or fakechroot. The
    only traffic is to the mirror. Cancelling ends every process and mount. Raises `Invalid` for names and packages that
    do not exist, `Unavailable` when the mirror does not answer, `Exhausted`, `MissingProgram`, `Failed`.
    """
    check_request(request)
    free = free_space_bytes(workspace)
    if free < _NEEDED_BYTES:
        raise Exhausted(
            f"cannot build template '{request.name}': {format_size(free)} are free in {workspace}, "
            f"a build needs {format_size(_NEEDED_BYTES)}",
            hint=f"df -h {workspace.parent}",
            free_bytes=free,
        )
    archive = workspace / "tree.tar"
    try:
        progress(Progress(step="tree", text="asking the mirror", fraction=0.0))
        sources = await asyncio.to_thread(_sources, request.suite, request.mirror)
        await _bootstrap(request, sources, archive, progress)

        def edit(tree: Tree, writer: ErofsWriter) -> None:
            renumber_system_ids(tree, lambda node: read_text(writer, node))
            _tidy(tree, request.suite)

        facts = await make_image(
            archive,
            workspace / "tree.erofs",
            limits=Limits(),
            report=lambda fraction: progress(
                Progress(step="tree", text="writing the image", fraction=_PACK_FROM + (1 - _PACK_FROM) * fraction)
            ),
            edit=edit,
        )
    finally:
        archive.unlink(missing_ok=True)
    return TreeDraft(
        image=workspace / "tree.erofs",
        init=request.init,
        command=(facts.shell,) if request.init is Init.APP and facts.shell else (),
        os_name=facts.os_name,
        cloud_init=facts.cloud_init,
        source=f"mmdebstrap {request.suite}" + (f" + {' '.join(request.packages)}" if request.packages else ""),
    )


def check_request(request: BuildTemplate) -> None:
    """Raise `Invalid` for names that could never be right (and would become arguments of a program)."""
    check_template_name(request.name)
    if not _SUITE.match(request.suite):
        raise Invalid(f"illegal suite {request.suite!r}: it needs the name of a Debian release, such as bookworm")
    for package in request.packages:
        if not _PACKAGE.match(package):
            raise Invalid(f"illegal package name {package!r}: it needs lower-case letters, digits, '+', '-' and '.'")
    if request.mirror is not None and not _MIRROR.match(request.mirror):
        raise Invalid(f"illegal mirror {request.mirror!r}: it needs an http or https address of a Debian archive")


def _sources(suite: str, mirror: str | None) -> tuple[str, ...]:
    """What to build from: the suite, and its updates and security fixes where the mirror has them (blocking)."""
    base = (mirror or PUBLIC_MIRROR).rstrip("/")
    if not _exists(f"{base}/dists/{suite}/InRelease"):
        raise Invalid(f"there is no suite '{suite}' on the mirror {base}", suite=suite, mirror=base)
    candidates = [(base, suite)]
    if suite not in _ROLLING:
        security = PUBLIC_SECURITY_MIRROR if mirror is None else f"{base}-security"
        extra = ((base, f"{suite}-updates"), (security, f"{suite}-security"))
        candidates += [(place, name) for place, name in extra if _exists(f"{place}/dists/{name}/InRelease")]
    return tuple(f"deb {place} {name} main" for place, name in candidates)


def _exists(address: str) -> bool:
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_MIRROR_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):
            return False
        raise Unavailable(f"the mirror answers {error.code} for {address}", mirror=address) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"the mirror cannot be reached at {address}: {reason}", mirror=address) from error


async def _bootstrap(request: BuildTemplate, sources: Sequence[str], archive: Path, progress: Report) -> None:
    packages = (*(_SYSTEM_PACKAGES if request.init is Init.SYSTEM else _APP_PACKAGES), *request.packages)
    complaints: list[str] = []
    mode = await _mode()
    try:
        await run_async(
            [
                "mmdebstrap",
                f"--mode={mode}",
                "--variant=minbase",
                "--format=tar",
                f"--include={','.join(packages)}",
                "--aptopt=Acquire::Languages none",
                *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
                request.suite,
                str(archive),
                *sources,
            ],
            on_line=_listener(progress, complaints),
            # The root of mode `unshare` is a subordinate id, which cannot enter a private workspace.
            environment={"TMPDIR": "/tmp" if mode == "unshare" else str(archive.parent)},
        )
    except CommandFailed as error:
        raise _explain(request, complaints, error) from error


async def _mode() -> str:
    """How mmdebstrap is to work (its option --mode).

    Its own choice takes user 0 for root, who in a locked-down container fails at chroot(2) or chown(2), and loses its
    way where newuidmap(1) is there but may not act (setuid programs may be refused: PR_SET_NO_NEW_PRIVS).
    """
    own = rights()
    if own.chroot:
        return "root"
    if own.user_id != 0 and await subordinate_ids_error(_TRIAL_SECONDS) is None:
        return "unshare"
    for program in ("fakechroot", "fakeroot"):
        find_program(program)
    return "fakechroot"


def _listener(progress: Report, complaints: list[str]) -> Callable[[str], None]:
    def listen(line: str) -> None:
        if line.startswith("E: ") or "dpkg: error" in line or "No space left" in line:
            complaints.append(line.removeprefix("E: "))
        for marker, fraction, text in _PHASES:
            if line.startswith(f"I: {marker}"):
                progress(Progress(step="tree", text=text, fraction=fraction))

    return listen


def _explain(request: BuildTemplate, complaints: Sequence[str], error: CommandFailed) -> Error:
    said = "\n".join(complaints) + error.stderr_tail
    missing = re.search(r"Unable to locate package (\S+)|Package '?([^' ]+)'? has no installation candidate", said)
    if missing:
        package = missing[1] or missing[2]
        return Invalid(f"there is no package '{package}' in suite '{request.suite}'", package=package)
    if "No space left on device" in said or "You don't have enough free space" in said:
        return Exhausted(f"the disk is full: template '{request.name}' could not be built", hint="df -h")
    reason = complaints[0] if complaints else error.message
    if re.search(r"Failed to fetch|Could not resolve|Temporary failure resolving|Unable to connect", said):
        return Unavailable(f"the mirror failed while template '{request.name}' was built: {reason}")
    return Failed(f"template '{request.name}' could not be built: {reason}")


def _tidy(tree: Tree, suite: str) -> None:
    """Leave the tree as an installed Debian: the public archive as its source, none of the build's configuration."""
    for path in (
        "etc/apt/apt.conf.d/99mmdebstrap",
        "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
        "etc/apt/sources.list",
        "etc/apt/sources.list.d",
        *(f"etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")),
    ):
        tree.remove(path)
    tree.put("etc/apt/sources.list.d/debian.sources", debian_sources(suite).encode())


def debian_sources(suite: str) -> str:
    """The deb822 source (sources.list(5)) of the public Debian archive, security fixes included."""
    archive = (PUBLIC_MIRROR, suite if suite in _ROLLING else f"{suite} {suite}-updates")
    security = () if suite in _ROLLING else ((PUBLIC_SECURITY_MIRROR, f"{suite}-security"),)
    return "\n".join(
        f"Types: deb\nURIs: {address}\nSuites: {suites}\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        for address, suites in (archive, *security)
    )
