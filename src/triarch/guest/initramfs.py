"""What the initramfs holds: our init, the modules it loads, and an SSH server with its own loader and libraries."""

from __future__ import annotations

import posixpath
import re
import tarfile
from pathlib import Path

import msgspec

from triarch.errors import Damaged
from triarch.guest import cpio
from triarch.guest.kernel import extract_vmlinux, order_modules, without_signature


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Debian packages that are unpacked, never installed: not on the host, and not in the guest either."""

    suite: str
    packages: tuple[str, ...]


KERNEL_SOURCE = Source(suite="bookworm", packages=("linux-image-cloud-amd64",))
# Debian's cloud kernel has no driver for the hardware of real machines.
GENERIC_KERNEL_SOURCE = Source(suite="bookworm", packages=("linux-image-amd64",))
# Not bookworm's dropbear: 2022.83 ends sessions that open while another one closes (mended in 2024.86, "failure on
# concurrent channel open/close"). It comes with its own loader and libraries, so the guest's suite does not matter.
AGENT_SOURCE = Source(suite="trixie", packages=("dropbear-bin", "openssh-sftp-server"))

# What init loads, stage by stage, as the configuration asks for it. The console comes first: the host's ports show up
# while the others load. systemd looks for autofs first of all.
STAGES = {
    "base": (
        # The cloud kernel has these in itself: checksums, which others ask for by name as they load, and the delta's.
        *("crc32c_generic", "crct10dif_generic", "crc64_rocksoft_generic", "ext4"),
        *("virtio_pci", "virtio_console", "virtio_blk", "erofs", "overlay"),
    ),
    "pmem": ("virtio_pmem", "nd_pmem"),
    "network": ("virtio_net",),
    "system": ("autofs4",),
    "memory": ("virtio_balloon",),
    "folder": ("virtiofs",),
    "emulated": ("ahci", "sd_mod", "sr_mod", "nfit", "e1000"),
}

_LIBRARIES = ("libc.so.6", "libcrypt.so.1", "libz.so.1", "libtomcrypt.so.1", "libtommath.so.1", "libgmp.so.10")
_LIBRARY_FOLDERS = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_LOADER = "ld-linux-x86-64.so.2"
_KERNEL = re.compile(r"boot/vmlinuz-(.+)\Z")
_MAX_LINKS = 20


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel and the initramfs of a guest pack, as bytes."""

    kernel: bytes
    initrd: bytes
    kernel_release: str


class PackageTree:
    """The unpacked packages of a source in a tar archive, of which a few files are read."""

    def __init__(self, source: Source, archive: Path) -> None:
        self._source = source
        self._tar = tarfile.open(archive)  # noqa: SIM115 - closed by close()
        self._members = {member.name.removeprefix("./").rstrip("/"): member for member in self._tar}

    def close(self) -> None:
        self._tar.close()

    def names(self) -> list[str]:
        return list(self._members)

    def has(self, path: str) -> bool:
        return self._resolve(path) in self._members

    def is_file(self, path: str) -> bool:
        """Whether this very path is a regular file; links are not followed."""
        member = self._members.get(path)
        return member is not None and member.isfile()

    def read(self, path: str) -> bytes:
        """A file's content; symbolic links are followed inside the tree. Raises `Damaged` when it is not there."""
        member = self._members.get(self._resolve(path))
        content = self._tar.extractfile(member) if member is not None and member.isfile() else None
        if content is None:
            raise Damaged(f"the guest's packages hold no {path}; they have {', '.join(self._source.packages)}")
        return content.read()

    def _resolve(self, path: str) -> str:
        done = ""
        rest = path.split("/")
        for _ in range(_MAX_LINKS):
            while rest:
                done = posixpath.normpath(posixpath.join("/", done, rest.pop(0))).lstrip("/")
                member = self._members.get(done)
                if member is not None and (member.issym() or member.islnk()):
                    break
            else:
                return done
            # A hard link's target is a path of the archive, a symbolic link's one of the tree.
            target = member.linkname if member.issym() else "/" + member.linkname.removeprefix("./")
            folder = "" if target.startswith("/") else posixpath.dirname(done)
            rest = [part for part in posixpath.join(folder, target.lstrip("/")).split("/") if part] + rest
            done = ""
        raise Damaged(f"the guest's packages hold a loop of links at {path}")


def compose(kernel: PackageTree, agent: PackageTree, init: bytes) -> Boot:
    """Kernel and initramfs out of unpacked packages and the compiled init. Raises `Damaged` for what is missing."""
    releases = [match[1] for name in kernel.names() if (match := _KERNEL.match(name))]
    if len(releases) != 1:
        raise Damaged(f"the guest's packages hold {len(releases)} kernels; one was expected")
    release = releases[0]
    entries = [
        cpio.file("init", init, 0o755),
        *_system_entries(),
        *_module_entries(kernel, release),
        *_agent_entries(agent),
    ]
    return Boot(
        kernel=extract_vmlinux(kernel.read(f"boot/vmlinuz-{release}")),
        initrd=cpio.write_archive(entries),
        kernel_release=release,
    )


def _system_entries() -> list[cpio.Entry]:
    return [
        *(cpio.folder(name) for name in ("dev", "proc", "sys", "new", "run")),
        cpio.file("etc/passwd", b"root:*:0:0:root:/:/init\n"),
        cpio.file("etc/group", b"root:x:0:\n"),
        cpio.file("etc/shells", b"/init\n"),
        cpio.file("etc/nsswitch.conf", b"passwd: files\n"),
    ]


def _module_entries(tree: PackageTree, release: str) -> list[cpio.Entry]:
    prefix = f"lib/modules/{release}/kernel/"
    paths = {
        posixpath.basename(name).removesuffix(".ko").replace("-", "_"): name
        for name in tree.names()
        if name.endswith(".ko") and prefix in name
    }

    def read(module: str) -> bytes | None:
        return without_signature(tree.read(paths[module])) if module in paths else None

    entries: dict[str, cpio.Entry] = {}
    for stage, wanted in STAGES.items():
        modules = {name: data for name, data in order_modules(wanted, read).items() if f"modules/{name}" not in entries}
        listing = cpio.file(f"modules/{stage}", "".join(f"{name}\n" for name in modules).encode())
        entries |= {
            entry.path: entry for entry in (listing, *(cpio.file(f"modules/{n}", d) for n, d in modules.items()))
        }
    return list(entries.values())


def _agent_entries(tree: PackageTree) -> list[cpio.Entry]:
    return [
        cpio.file("bin/dropbear", tree.read("usr/sbin/dropbear"), 0o755),
        cpio.file("bin/sftp-server", tree.read("usr/lib/openssh/sftp-server"), 0o755),
        cpio.file(f"lib64/{_LOADER}", _read_library(tree, _LOADER), 0o755),
        *(cpio.file(f"lib/{name}", _read_library(tree, name), 0o755) for name in _LIBRARIES),
    ]


def _read_library(tree: PackageTree, name: str) -> bytes:
    # Packages that are only unpacked have not been moved to /usr.
    folder = next((folder for folder in _LIBRARY_FOLDERS if tree.has(f"{folder}/{name}")), _LIBRARY_FOLDERS[0])
    return tree.read(f"{folder}/{name}")
