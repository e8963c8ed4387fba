"""Real trees from real packages. Slow: needs the Debian mirror and about a minute each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triarch.errors import Invalid, MissingProgram, Unavailable
from triarch.host.process import find_program
from triarch.model.operation import Progress
from triarch.model.request import BuildTemplate
from triarch.model.template import Init
from triarch.templates.build import build_tree
from triarch.testing.image_reader import Entry, read_image

pytestmark = pytest.mark.slow

UNITS = b"usr/lib/systemd/system/"


@contextmanager
def needs_mirror() -> Iterator[None]:
    """Skip where this host has no mmdebstrap, no mirror, or no way to make a chroot."""
    try:
        find_program("mmdebstrap")
        yield
    except (MissingProgram, Unavailable) as error:
        pytest.skip(error.message)


def processes_in(workspace: Path) -> list[str]:
    """Command lines of living processes that mention the workspace."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if os.fsencode(workspace) in line:
            found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def ids(found: dict[bytes, Entry], path: bytes, columns: slice) -> set[int]:
    lines = [line.split(b":") for line in found[path].content.splitlines()]
    return {int(number) for line in lines for number in line[columns]}


async def test_system_template(tmp_path: Path) -> None:
    reports: list[Progress] = []
    with needs_mirror():
        draft = await build_tree(BuildTemplate(name="bookworm", packages=("openssh-server",)), tmp_path, reports.append)
    assert list(tmp_path.iterdir()) == [draft.image]
    assert draft.init is Init.SYSTEM
    assert draft.os_name == "Debian GNU/Linux 12 (bookworm)"
    fractions = [report.fraction or 0.0 for report in reports]
    assert len(fractions) > 6 and fractions == sorted(fractions)

    found = read_image(draft.image)
    assert found[b"usr/sbin/init"].content.endswith(b"lib/systemd/systemd")
    assert {UNITS + b"multi-user.target", UNITS + b"serial-getty@.service"} <= set(found)
    assert found[b"usr/bin/su"].mode == 0o104755
    assert b"security.capability" in found[b"usr/bin/ping"].xattrs

    assert found[b"etc/machine-id"].content == b""
    assert not [
        name for name in found if name.startswith((b"etc/ssh/ssh_host_", b"dev/", b"run/", b"var/lib/apt/lists/"))
    ]
    assert b"etc/systemd/system/multi-user.target.wants/triarch-ssh-host-keys.service" in found
    assert not {b"etc/hostname", b"var/lib/systemd/random-seed", b"etc/apt/sources.list"} & set(found)
    assert b"deb.debian.org/debian-security" in found[b"etc/apt/sources.list.d/debian.sources"].content
    assert not [name for name in found if b"99mmdebstrap" in name]

    dynamic = set(range(500, 1000))
    assert not ids(found, b"etc/passwd", slice(2, 4)) & dynamic
    assert not ids(found, b"etc/group", slice(2, 3)) & dynamic
    assert not {entry.uid for entry in found.values()} & dynamic
    assert not {entry.gid for entry in found.values()} & dynamic
    groups = ids(found, b"etc/group", slice(2, 3))
    assert {entry.gid for entry in found.values()} <= groups


async def test_cancelling_leaves_neither_process_nor_mount_nor_file(tmp_path: Path) -> None:
    unpacking = asyncio.Event()

    def report(progress: Progress) -> None:
        if progress.text == "installing the base system":
            unpacking.set()

    with needs_mirror():
        request = BuildTemplate(name="app", init=Init.APP)
        task = asyncio.create_task(build_tree(request, tmp_path, report))
        reached = asyncio.create_task(unpacking.wait())
        await asyncio.wait([task, reached], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            reached.cancel()
            await task
    assert processes_in(tmp_path)
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


async def test_suite_that_does_not_exist(tmp_path: Path) -> None:
    with needs_mirror(), pytest.raises(Invalid, match="there is no suite 'bokworm' on the mirror"):
        await build_tree(BuildTemplate(name="x", suite="bokworm"), tmp_path, lambda progress: None)
    assert list(tmp_path.iterdir()) == []


async def test_mirror_that_does_not_answer(tmp_path: Path) -> None:
    request = BuildTemplate(name="x", mirror="http://127.0.0.1:9/debian")
    find = pytest.raises(Unavailable, match=r"cannot be reached at http://127\.0\.0\.1:9/debian")
    with find:
        await build_tree(request, tmp_path, lambda progress: None)
    assert list(tmp_path.iterdir()) == []


async def test_package_that_does_not_exist(tmp_path: Path) -> None:
    request = BuildTemplate(name="x", packages=("no-such-package",), init=Init.APP)
    with needs_mirror(), pytest.raises(Invalid, match="there is no package 'no-such-package' in suite 'bookworm'"):
        await build_tree(request, tmp_path, lambda progress: None)
    assert list(tmp_path.iterdir()) == []
