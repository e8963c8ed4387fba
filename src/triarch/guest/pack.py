"""The guest pack: kernel and initramfs, shared by every machine that runs as a VM, built once and kept in a cache.

`python -m triarch.guest.pack` builds it ahead of its first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from triarch.errors import Busy, Denied, Error
from triarch.guest import cpio, initramfs, kernel, modules
from triarch.host.files import sha256_of
from triarch.host.locks import lock_file
from triarch.host.process import run_async
from triarch.model.device import Hardware
from triarch.model.driver import GuestPack
from triarch.model.instance import home_directory
from triarch.model.operation import Progress

KERNEL_FILE = "vmlinux"
INITRD_FILE = "initrd"
MODULES_FILE = "modules.erofs"
MANIFEST_FILE = "manifest.json"
_FORMAT = "1"
_KERNELS = {Hardware.PARAVIRT: initramfs.KERNEL_SOURCE, Hardware.EMULATED: initramfs.GENERIC_KERNEL_SOURCE}
_STEP = "guest pack"
_COMPILER_FLAGS = ("-static", "-Os", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-s")
_INIT_SOURCE = Path(__file__).parent / "init"
# The file server is part of it, without a main of its own.
_FILES_SOURCE = Path(__file__).parent / "files"
_LOCK_POLL_SECONDS = 0.2

Report = Callable[[Progress], None]


class PackedFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of the pack must be. `modified_ns` tells whether it may have changed since it was hashed."""

    name: str
    size_bytes: int
    modified_ns: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The pack's own table of contents, written last."""

    kernel_release: str
    files: tuple[PackedFile, ...]


def default_cache() -> Path:
    """Where packs are kept: for everyone when root builds them, else for this user."""
    if os.geteuid() == 0:
        return Path("/var/cache/triarch/guest")
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home_directory() / ".cache") / "triarch" / "guest"


async def ensure_pack(
    progress: Report, *, cache: Path | None = None, hardware: Hardware = Hardware.PARAVIRT
) -> GuestPack:
    """The guest pack of this version of Triarch, built when the cache holds none or a damaged one.

    `hardware` is what its kernel has to have drivers for: each kind has a pack of its own.

    Cancellable; safe when several processes ask at once. Raises `MissingProgram`, `CommandFailed` (no network to the
    distribution's mirror), `Damaged` when the packages are not what was expected, `Denied`.
    """
    cache = cache or default_cache()
    directory = cache / pack_key(hardware)
    pack = await asyncio.to_thread(_open_pack, directory)
    if pack is not None:
        return pack
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Denied(f"cannot make the directory of guest packs {cache}: {reason}") from error
    lock = await _take_lock(directory.with_suffix(".lock"), progress)
    try:
        pack = await asyncio.to_thread(_open_pack, directory)
        if pack is not None:
            return pack
        await _build(directory, (_KERNELS[hardware], initramfs.AGENT_SOURCE), progress)
    finally:
        os.close(lock)
    pack = await asyncio.to_thread(_open_pack, directory)
    assert pack is not None, "a pack that was just built opens"
    return pack


def init_sources() -> tuple[Path, ...]:
    """The C files that the guest's init is made of."""
    return (*_INIT_SOURCE.glob("*.c"), *(path for path in _FILES_SOURCE.glob("*.c") if path.name != "main.c"))


@functools.cache
def pack_key(hardware: Hardware = Hardware.PARAVIRT) -> str:
    """A name that changes with everything that goes into a pack."""
    recipe = (_FORMAT, *_COMPILER_FLAGS, *(() if hardware is Hardware.PARAVIRT else (hardware.value,)))
    sources = sorted((*_INIT_SOURCE.glob("*.[ch]"), *_FILES_SOURCE.glob("*.[ch]")))
    digest = hashlib.sha256("\n".join(recipe).encode())
    recipes = (cpio.__file__, kernel.__file__, initramfs.__file__, modules.__file__)
    for path in (*sources, *map(Path, recipes)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# Files that this process has hashed, by path, with the state they were in.
_hashed: dict[Path, tuple[int, int]] = {}


def _open_pack(directory: Path) -> GuestPack | None:
    """The pack in `directory`, None when it is absent or damaged. Files are hashed once per process, then compared by
    size and time of change."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes(), type=Manifest)
        sound = all(_is_sound(directory / packed.name, packed) for packed in manifest.files)
    except (OSError, msgspec.MsgspecError):
        return None
    if not sound:
        return None
    return GuestPack(
        kernel_path=str(directory / KERNEL_FILE),
        initrd_path=str(directory / INITRD_FILE),
        modules_path=str(directory / MODULES_FILE),
        kernel_release=manifest.kernel_release,
    )


def _is_sound(path: Path, packed: PackedFile) -> bool:
    status = path.stat()
    state = (status.st_size, status.st_mtime_ns)
    if state == _hashed.get(path):
        return True
    if status.st_size != packed.size_bytes or sha256_of(path) != packed.sha256:
        return False
    _hashed[path] = state
    return True


async def _take_lock(path: Path, progress: Report) -> int:
    path.touch()
    while True:
        try:
            return lock_file(path)
        except Busy:
            progress(Progress(step=_STEP, text="another process is building the guest pack"))
            await asyncio.sleep(_LOCK_POLL_SECONDS)


async def _build(directory: Path, packages: Sequence[initramfs.Source], progress: Report) -> None:
    partial = directory.with_suffix(".partial")
    _remove(partial)
    partial.mkdir()
    try:
        progress(Progress(step=_STEP, text="compiling the guest's init", fraction=0.0))
        init = partial / "init"
        sources = sorted(str(path) for path in init_sources())
        await run_async(("cc", *_COMPILER_FLAGS, f"-I{_FILES_SOURCE}", "-o", str(init), *sources))
        archives = [partial / f"{source.suite}.tar" for source in packages]
        for source, archive in zip(packages, archives, strict=True):
            await _fetch_packages(source, archive, progress)
        progress(Progress(step=_STEP, text="writing kernel, initramfs and modules", fraction=0.8))
        await asyncio.to_thread(_write_pack, partial, packages, archives, init)
        for leftover in (*archives, init):
            leftover.unlink()
        _remove(directory)
        partial.rename(directory)
    finally:
        _remove(partial)
    progress(Progress(step=_STEP, text="guest pack is ready", fraction=1.0))


async def _fetch_packages(source: initramfs.Source, archive: Path, progress: Report) -> None:
    """Unpack the packages and what they depend on into an archive; no maintainer script runs (see mmdebstrap(1))."""

    def on_line(line: str) -> None:
        if line.startswith("I: "):
            progress(Progress(step=_STEP, text=line.removeprefix("I: ").strip(), fraction=0.1))

    packages = ",".join(source.packages)
    options = ("--mode=chrootless", "--variant=extract", f"--include={packages}", "--format=tar")
    # Nothing but unpacking happens, which needs no rights: neither chroot(2) nor, with this setting, chown(2).
    environment = {"TAR_OPTIONS": "--no-same-owner"}
    await run_async(("mmdebstrap", *options, source.suite, str(archive)), on_line=on_line, environment=environment)


def _write_pack(partial: Path, sources: Sequence[initramfs.Source], archives: Sequence[Path], init: Path) -> None:
    with contextlib.ExitStack() as opened:
        packages, agent = (initramfs.PackageTree(*pair) for pair in zip(sources, archives, strict=True))
        for tree in (packages, agent):
            opened.callback(tree.close)
        boot = initramfs.compose(packages, agent, init.read_bytes())
        image = partial / "modules"
        modules.write_modules_image(packages, boot.kernel_release, image, partial)
    contents = {KERNEL_FILE: boot.kernel, INITRD_FILE: boot.initrd, MODULES_FILE: image.read_bytes()}
    image.unlink()
    files = tuple(_write_file(partial / name, data) for name, data in contents.items())
    manifest = Manifest(kernel_release=boot.kernel_release, files=files)
    (partial / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))


def _write_file(path: Path, data: bytes) -> PackedFile:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.chmod(0o644)
    status = path.stat()
    return PackedFile(
        name=path.name,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """Build the pack, telling what happens on standard error."""
    started = time.monotonic()

    def report(progress: Progress) -> None:
        print(f"guest pack: {progress.text}", file=sys.stderr)

    try:
        pack = asyncio.run(ensure_pack(report))
    except Error as error:
        print(f"guest pack: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    print(f"{Path(pack.kernel_path).parent} ({pack.kernel_release}, {time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
