"""Files of real machines, container and VM, running and stopped: through the client and through the command line."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from files_rig import names_in
from site_rig import Site

from triarch.client import Client
from triarch.client.file_local import RESUMABLE_BYTES, Transfer
from triarch.client.file_push import Overrides
from triarch.client.files import Files
from triarch.errors import Busy, DaemonUnavailable, Exhausted, NotFound, WrongState
from triarch.model.file_protocol import FileKind
from triarch.testing.leaks import leaks

pytestmark = pytest.mark.slow

IDLE = ("--", "/bin/sh", "-c", "sleep 100000")
BIG_BYTES = 130 << 20
MACHINES = ("box", "off", "vm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A running container `box`, a stopped machine `off`, a running VM `vm`."""
    skip_without_busybox()
    root = tmp_path_factory.mktemp("files")
    busybox_tree(root / "tree")
    site = Site(root / "root")
    site.run("template", "import", "tiny", str(archive_of(root / "tree")))
    # A guest whose processor is emulated takes a second for two megabytes.
    for name, architecture, disk in (("box", "container", "128M"), ("vm", "hosted", "64M")):
        options = ("--as", architecture, "--network", "none", "--disk", disk, "-c", "stop-timeout=2")
        site.run("launch", "tiny", name, *options, *IDLE)
    site.run("create", "tiny", "off", "--network", "none", "--disk", "128M")
    yield site
    site.run("down")
    assert leaks(site.instance) == ()


@pytest.fixture
def client(place: Site) -> Iterator[Client]:
    with Client(place.instance) as client:
        yield client


def make_tree(root: Path) -> None:
    """One of everything that is copied."""
    (root / "sub").mkdir(parents=True)
    (root / "file").write_bytes(b"content")
    (root / "other").hardlink_to(root / "file")
    os.setxattr(root / "file", "user.colour", b"\0red")
    os.chown(root / "file", 1000, 7000)
    (root / "file").chmod(0o4751)
    (root / "link").symlink_to("/etc/passwd")
    os.chown(root / "link", 7, 8, follow_symlinks=False)
    os.mkfifo(root / "pipe", 0o640)
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(32 << 20)
        file.write(b"island")
    Path(os.fsdecode(os.fsencode(root) + b"/odd \n\xff")).write_bytes(b"")
    (root / "sub").chmod(0o2770)
    os.utime(root / "sub", ns=(10**18, 10**18 + 123_456_789))


def facts(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a copy keeps, by name."""
    found: dict[bytes, tuple[object, ...]] = {}
    for directory, names, files in os.walk(os.fsencode(root)):
        for name in names + files:
            path = os.path.join(directory, name)  # noqa: PTH118
            status = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else b""  # noqa: PTH115
            xattrs = os.listxattr(path) if stat.S_ISREG(status.st_mode) else []
            content = Path(os.fsdecode(path)).read_bytes() if stat.S_ISREG(status.st_mode) else b""
            found[os.path.relpath(path, os.fsencode(root))] = (
                stat.filemode(status.st_mode),
                (status.st_uid, status.st_gid, status.st_mtime_ns),
                (status.st_nlink, target, content),
                [(name, os.getxattr(path, name)) for name in xattrs],
            )
    return found


@pytest.mark.parametrize("direct", [True, False], ids=["socket", "stream"])
@pytest.mark.parametrize("name", MACHINES)
def test_a_tree_comes_back_as_it_went(client: Client, tmp_path: Path, name: str, direct: bool) -> None:
    files = Files(client, direct=direct)
    make_tree(tmp_path / "tree")
    target = f"/root/{direct}".encode()
    pushed = files.push(name, [os.fsencode(tmp_path / "tree")], target, recursive=True)
    assert not pushed.errors and not pushed.skipped
    pulled = files.pull(name, [target], os.fsencode(tmp_path / "back"), recursive=True, trusted=True)
    assert not pulled.errors and not pulled.skipped
    assert facts(tmp_path / "back") == facts(tmp_path / "tree")
    assert (tmp_path / "back/sparse").stat().st_blocks * 512 < 1 << 20
    files.delete(name, target, recursive=True)
    assert files.stat(name, target) is None


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_person_says_of_owner_and_mode_counts(client: Client, name: str) -> None:
    overrides = Overrides(uid=33, gid=44, mode=0o600)
    client.files.push_stream(name, io.BytesIO(b"secret"), b"/root/secret", overrides)
    found = client.files.stat(name, b"/root/secret")
    assert found is not None
    assert (found.uid, found.gid, found.mode, found.size_bytes) == (33, 44, 0o600, 6)
    out = io.BytesIO()
    client.files.pull_stream(name, b"/root/secret", out)
    assert out.getvalue() == b"secret"


@pytest.mark.parametrize("name", MACHINES)
def test_a_full_disk_says_what_it_takes_and_keeps_what_was_there(client: Client, tmp_path: Path, name: str) -> None:
    client.files.push_stream(name, io.BytesIO(b"old"), b"/root/precious")
    big = tmp_path / "big"
    big.write_bytes(os.urandom(BIG_BYTES))
    (error,) = client.files.push(name, [os.fsencode(big)], b"/root/precious").errors
    assert isinstance(error, Exhausted)
    assert f"machine '{name}'" in error.message
    assert error.fields["needed_bytes"] == BIG_BYTES
    assert 32 << 20 < int(error.fields["free_bytes"] or 0) < BIG_BYTES, "what was begun is gone again"
    out = io.BytesIO()
    client.files.pull_stream(name, b"/root/precious", out)
    assert out.getvalue() == b"old"
    assert not any(b".partial" in entry.path for entry in client.files.list(name, b"/root"))


@pytest.mark.parametrize("name", ["box", "off"])
def test_a_copy_goes_on_where_it_was_broken(client: Client, tmp_path: Path, name: str) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(8 * RESUMABLE_BYTES))
    size_bytes = big.stat().st_size

    def cut(transfer: Transfer) -> None:
        if transfer.done_bytes > size_bytes // 2:
            raise KeyboardInterrupt

    def note(steps: list[int], transfer: Transfer) -> None:
        steps.append(transfer.done_bytes)

    for copy in (
        lambda report: client.files.push(name, [os.fsencode(big)], b"/root/big", report=report),
        lambda report: client.files.pull(name, [b"/root/big"], os.fsencode(tmp_path / "back"), report=report),
    ):
        with pytest.raises(KeyboardInterrupt):
            copy(cut)
        steps: list[int] = []
        assert not copy(partial(note, steps)).errors
        assert steps[0] >= size_bytes // 4, "what was there already was not copied again"
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert names_in(tmp_path) == ["back", "big"]
    client.files.delete(name, b"/root/big")
    assert not any(b".partial" in entry.path for entry in client.files.list(name, b"/root"))


def test_two_copies_of_one_file_at_once_are_two_copies(client: Client, place: Site, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(4 * RESUMABLE_BYTES))
    command = [*argv(place), "file", "push", str(big), "box/root/twice"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    client.files.pull("box", [b"/root/twice"], os.fsencode(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == big.read_bytes()
    assert not any(b".partial" in entry.path for entry in client.files.list("box", b"/root"))
    client.files.delete("box", b"/root/twice")


def argv(place: Site) -> list[str]:
    from triarch.testing.daemon_rig import triarch_argv

    return triarch_argv("--root", str(place.root))


def test_a_stopped_machine_is_held_while_somebody_is_at_its_files(client: Client) -> None:
    with client.files.visit("off") as link:
        link.sync()
        assert client.machine("off").operation is not None
        with pytest.raises(Busy, match="files"):
            client.start("off")
        with pytest.raises(Busy):
            client.files.list("off", b"/")
    assert client.machine("off").operation is None


def test_a_daemon_that_is_killed_leaves_nothing_of_a_visit(client: Client, place: Site) -> None:
    with pytest.raises(DaemonUnavailable), client.files.visit("off") as link:
        link.sync()
        os.kill(client.server().pid, signal.SIGKILL)
        link.next()
    client.close()
    place.run("file", "list", "off/")
    with Client(place.instance) as again:
        assert again.files.list("off", b"/etc")
        assert again.machine("off").operation is None
        again.finish(again.start("off"))
        again.finish(again.kill("off"))


def test_an_owner_that_a_container_cannot_have_is_named(client: Client, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    os.chown(tmp_path / "x", 70_000, 0)
    (error,) = client.files.push("box", [os.fsencode(tmp_path / "x")], b"/root/x").errors
    assert "owner" in error.message and error.hint is not None and "--uid" in error.hint
    assert not client.files.push("box", [os.fsencode(tmp_path / "x")], b"/root/x", overrides=Overrides(uid=0)).errors


def test_a_paused_machine_and_one_that_is_not_there_are_refused(client: Client) -> None:
    client.finish(client.pause("box"))
    try:
        with pytest.raises(WrongState) as refused:
            client.files.list("box", b"/")
        assert refused.value.hint == "triarch resume box"
    finally:
        client.finish(client.resume("box"))
    with pytest.raises(NotFound):
        client.files.list("nobody", b"/")
    with pytest.raises(NotFound):
        client.files.list("box", b"/nowhere")


HOSTILE = r"""
mkdir -p /evil/deep; cd /evil
ln -s / root; ln -s /etc/passwd passwd; ln -s ../../../../../../etc up; mkfifo pipe; ln -s . loop
yes > endless & echo $! > /evil.pid; sleep 0.2; mkdir closed; chmod 0 closed; echo x > closed/x
a=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
(cd deep; i=0; while [ $i -lt 100 ]; do mkdir $a; cd $a; i=$((i+1)); done)
printf x > "$(printf 'new\nline')"; cp /bin/busybox su; chmod 6755 su
"""


def test_a_hostile_tree_stays_where_it_is_put(client: Client, place: Site, tmp_path: Path) -> None:
    """Links that lead out, a file that grows for ever, pipes that nobody writes to, names of all kinds."""
    place.run("exec", "box", "--", "sh", "-c", HOSTILE)
    before = {name: (Path("/etc") / name).stat().st_mtime_ns for name in ("passwd", "hosts")}
    (tmp_path / "in").mkdir()
    try:
        outcome = client.files.pull("box", [b"/evil"], os.fsencode(tmp_path / "in"), recursive=True)
    finally:
        place.run(
            "exec",
            "box",
            "--",
            "sh",
            "-c",
            "kill $(ps | grep yes | awk '{print $1}') 2>/dev/null; rm -rf /evil",
            check=False,
        )
    assert outcome.disarmed == 1
    assert names_in(tmp_path) == ["in"] and names_in(tmp_path / "in") == ["evil"]
    here = tmp_path / "in/evil"
    assert (here / "root").is_symlink() and (here / "passwd").is_symlink()
    assert stat.S_IMODE((here / "su").stat().st_mode) == 0o755
    assert (here / "closed/x").read_text() == "x\n"
    assert before == {name: (Path("/etc") / name).stat().st_mtime_ns for name in ("passwd", "hosts")}


@pytest.mark.parametrize("name", ["box", "off"])
def test_the_machines_own_links_lead_into_the_machine(client: Client, place: Site, tmp_path: Path, name: str) -> None:
    """Pushed through a link that leads out, a file lands where the link leads in the machine."""
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    tree = tmp_path / "links"
    tree.mkdir()
    (tree / "out").symlink_to(tmp_path)
    (tree / "secret").symlink_to(secret)
    assert not client.files.push(name, [os.fsencode(tree)], b"/root/", recursive=True).errors
    outcome = client.files.push(name, [b"/etc/hostname"], b"/root/links/out/secret")
    assert [type(error) for error in outcome.errors] == [NotFound]
    with pytest.raises(NotFound):
        client.files.pull_stream(name, b"/root/links/secret", io.BytesIO())
    assert secret.read_text() == "the host's"
    entry = client.files.stat(name, b"/root/links/out", follow=False)
    assert entry is not None and entry.kind is FileKind.SYMLINK


def test_the_command_line_says_it_all(place: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("hello\n")
    place.run("file", "push", "-p", str(tmp_path / "x"), "box/a/b/c", "--mode", "600", "--uid", "5")
    assert place.run("file", "pull", "box/a/b/c", "-") == "hello\n"
    assert "0600   file     5     0      6" in place.run("file", "ls", "box/a/b")
    monkeypatch.setenv("EDITOR", "sed -i s/hello/bye/")
    place.run("file", "edit", "box/a/b/c")
    assert place.run("file", "pull", "box/a/b/c", "-") == "bye\n"
    assert '"uid": 5' in place.run("file", "list", "box/a/b", "-o", "json")
    place.run("file", "delete", "-r", "box/a")
    refused = subprocess.run([*argv(place), "file", "list", "box/a"], capture_output=True, text=True, check=False)
    assert refused.returncode and "cannot list 'box/a': no such file or directory" in refused.stderr
