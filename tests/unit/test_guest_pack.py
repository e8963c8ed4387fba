"""The parts of the guest pack: archive, modules, kernel, keys, and the cache around them."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from triarch.errors import Damaged, Invalid
from triarch.guest import cpio, pack
from triarch.guest.agent import encode_request
from triarch.guest.initramfs import KERNEL_SOURCE, PackageTree, Source
from triarch.guest.kernel import extract_vmlinux, order_modules, without_signature
from triarch.guest.keys import generate_keys
from triarch.model.driver import ExecRequest

INIT = Path(pack.__file__).parent / "init"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_reads_what_was_written(tmp_path: Path) -> None:
    archive = cpio.write_archive(
        [cpio.file("init", b"#!", 0o755), cpio.folder("proc", 0o555), cpio.file("a/b/c", b"odd"), cpio.file("a/d", b"")]
    )
    done = subprocess.run(["cpio", "-idm", "--quiet"], input=archive, cwd=tmp_path, capture_output=True, check=True)
    assert done.stderr == b""
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "proc").stat().st_mode & 0o777 == 0o555
    assert (tmp_path / "a/b/c").read_bytes() == b"odd"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "d", "init", "proc"]


def test_modules_come_after_what_they_need() -> None:
    modules = {
        "blk": b"ELF\0depends=ring,core\0",
        "ring": b"\0depends=core\0",
        "core": b"\0depends=\0",
        "other": b"\0depends=builtin\0",
    }
    assert list(order_modules(("blk", "other", "ring"), modules.get)) == ["core", "ring", "blk", "other"]


def test_signatures_are_cut_off() -> None:
    signed = b"\x7fELF module" + b"s" * 300 + bytes(8) + struct.pack(">I", 300) + b"~Module signature appended~\n"
    assert without_signature(signed) == b"\x7fELF module"
    assert without_signature(b"\x7fELF module") == b"\x7fELF module"


def _bzimage(payload: bytes) -> bytes:
    header = bytearray(2 * 512)
    header[0x1F1] = 1
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", header, 0x248, 16, len(payload))
    return bytes(header) + bytes(16) + payload


def test_kernel_is_taken_out_of_its_wrapping() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 40
    assert extract_vmlinux(_bzimage(gzip.compress(elf) + struct.pack("<I", len(elf)))) == elf


@pytest.mark.skipif(shutil.which("lz4") is None, reason="needs lz4")
def test_kernel_in_the_old_lz4_format() -> None:
    elf = b"\x7fELF" + bytes(1 << 20)
    packed = subprocess.run(["lz4", "-lcq"], input=elf, capture_output=True, check=True).stdout
    assert extract_vmlinux(_bzimage(packed + struct.pack("<I", len(elf)))) == elf


@pytest.mark.parametrize(
    "raw",
    [b"", bytes(4096), _bzimage(b"\xfd7zXZ\0broken"), _bzimage(gzip.compress(b"no kernel")), _bzimage(b"unknown")],
)
def test_a_broken_kernel_is_refused(raw: bytes) -> None:
    with pytest.raises(Damaged, match="kernel"):
        extract_vmlinux(raw)


def _tar(path: Path, entries: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(f"./{name}")
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_links_are_followed_inside_the_package_tree(tmp_path: Path) -> None:
    archive = _tar(
        tmp_path / "p.tar",
        {
            "usr/lib/libx.so.1.2": b"x",
            "usr/lib/libx.so.1": "libx.so.1.2",
            "lib": "usr/lib",
            "abs": "/lib/libx.so.1",
            "up": "../../../../usr/lib/libx.so.1.2",
            "loop": "loop",
        },
    )
    tree = PackageTree(KERNEL_SOURCE, archive)
    try:
        assert tree.read("lib/libx.so.1") == tree.read("abs") == tree.read("up") == b"x"
        with pytest.raises(Damaged, match="loop"):
            tree.read("loop")
        with pytest.raises(Damaged, match="hold no etc/absent"):
            tree.read("etc/absent")
    finally:
        tree.close()


def test_keys_are_what_dropbear_and_openssh_read() -> None:
    keys = generate_keys()
    kind, _, blob = keys.host_public_key.partition(" ")
    public = base64.b64decode(blob)[-32:]
    assert kind == "ssh-ed25519"
    assert keys.host_key[:19] == b"\0\0\0\x0bssh-ed25519\0\0\0\x40"
    assert keys.host_key.endswith(public)
    assert len(keys.host_key) == 19 + 64
    assert keys.client_key.startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert generate_keys() != keys


def test_requests_are_netstrings() -> None:
    request = ExecRequest(command=("echo", "ü 5:x"), user="bob:44", directory="/tmp", environment={"A": "b=c"})
    assert encode_request(request) == "6:bob:444:/tmp1:01:04:50001:24:echo6:ü 5:x5:A=b=c".encode()
    login = ExecRequest(login=True, timeout_seconds=1.5)
    assert encode_request(login) == b"1:00:1:14:15004:50001:0"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExecRequest(command=()), "no command"),
        (ExecRequest(command=("a\0",)), "NUL"),
        (ExecRequest(command=("a",), environment={"A=B": ""}), "without '='"),
        (ExecRequest(command=("\udc80",)), "not valid text"),
        (ExecRequest(command=("a" * (3 << 20),)), "at most 2097152"),
    ],
)
def test_impossible_requests_are_refused(request_: ExecRequest, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        encode_request(request_)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
def test_init_compiles_without_a_warning(tmp_path: Path) -> None:
    sources = sorted(str(path) for path in pack.init_sources())
    include = f"-I{pack._FILES_SOURCE}"
    subprocess.run(["cc", *pack._COMPILER_FLAGS, include, "-o", str(tmp_path / "init"), *sources], check=True)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Building replaced by a few bytes: what is tested here is the cache around it. Counts the builds."""
    builds: list[str] = []

    async def fetch(source: Source, archive: Path, progress: pack.Report) -> None:
        if source is KERNEL_SOURCE:
            builds.append(archive.name)
        await asyncio.sleep(0.3)
        archive.write_bytes(b"")

    def write(partial: Path, sources: object, archives: Sequence[Path], init: Path) -> None:
        files = tuple(
            pack._write_file(partial / name, name.encode())
            for name in (pack.KERNEL_FILE, pack.INITRD_FILE, pack.MODULES_FILE)
        )
        manifest = pack.Manifest(kernel_release="6.1", files=files)
        (partial / pack.MANIFEST_FILE).write_bytes(pack.msgspec.json.encode(manifest))

    monkeypatch.setattr(pack, "_fetch_packages", fetch)
    monkeypatch.setattr(pack, "_write_pack", write)
    return builds


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
async def test_two_that_ask_at_once_build_once(recipe: list[str], tmp_path: Path) -> None:
    heard: list[str] = []
    first, second = await asyncio.gather(
        *(pack.ensure_pack(lambda progress: heard.append(progress.text), cache=tmp_path) for _ in range(2))
    )
    assert first == second
    assert len(recipe) == 1
    assert Path(first.kernel_path).read_bytes() == b"vmlinux"
    assert "another process is building the guest pack" in heard
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
async def test_a_damaged_pack_is_built_again(recipe: list[str], tmp_path: Path) -> None:
    built = await pack.ensure_pack(lambda progress: None, cache=tmp_path)
    kernel = Path(built.kernel_path)
    kernel.write_bytes(b"damaged")  # as long as it was
    os.utime(kernel)
    again = await pack.ensure_pack(lambda progress: None, cache=tmp_path)
    assert again == built
    assert kernel.read_bytes() == b"vmlinux"
    assert len(recipe) == 2
    Path(built.initrd_path).unlink()
    await pack.ensure_pack(lambda progress: None, cache=tmp_path)
    assert len(recipe) == 3


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
async def test_a_cancelled_build_leaves_nothing(recipe: list[str], tmp_path: Path) -> None:
    task = asyncio.create_task(pack.ensure_pack(lambda progress: None, cache=tmp_path))
    while not recipe:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
