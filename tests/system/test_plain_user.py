"""Hosted machines where the host allows less: through the command line, from an imported template to `down`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from qemu_rig import guest_pack, make_tree

from triarch.model.instance import Instance, instance_at
from triarch.model.machine import MachineView
from triarch.model.request import Check, CheckStatus
from triarch.model.state import State
from triarch.testing.daemon_rig import triarch_argv
from triarch.testing.leaks import leaks

SECONDS = 120
PLAIN_USER_ID = 1_966_083
PAGE = "served without any rights\n"
SERVE = f"mkdir /www && echo '{PAGE.strip()}' >/www/index.html && exec httpd -f -p 80 -h /www"

NOTHING = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all")
DOCKERS = "+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,+net_bind_service,+net_raw,+sys_chroot"
# How a process comes to have few rights, what it needs to begin with, and what `doctor` then says of it.
CONFINEMENTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "plain user": (
        ("setpriv", f"--reuid={PLAIN_USER_ID}", f"--regid={PLAIN_USER_ID}", "--clear-groups", *NOTHING),
        f"user {PLAIN_USER_ID} is not root",
    ),
    "root without capabilities": (("setpriv", *NOTHING), "this is root without CAP_SYS_ADMIN, CAP_NET_ADMIN"),
    "root of a locked-down container": (
        ("setpriv", "--no-new-privs", f"--bounding-set=-all,{DOCKERS}", "--inh-caps=-all"),
        "this is root without CAP_SYS_ADMIN, CAP_NET_ADMIN",
    ),
    "root of a user namespace": (("unshare", "--user", "--map-root-user"), "this is root of a user namespace"),
}


class Confined:
    """The command line of an instance of its own, with few rights. `directory` is its home and holds everything."""

    def __init__(self, directory: Path, confinement: str) -> None:
        self.directory = directory
        prefix, self.expected = CONFINEMENTS[confinement]
        self.user_id = os.geteuid()
        if self.user_id != 0:
            if confinement != "plain user":
                pytest.skip("needs root, to take rights away from it")
            prefix, self.expected = (), f"user {self.user_id} is not root"
        elif confinement == "plain user":
            self.user_id = PLAIN_USER_ID
        self._prefix = prefix
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "XDG_RUNTIME_DIR": str(directory / "run"),
            "TRIARCH_ROOT": str(directory / "root"),
            "NO_COLOR": "1",
        }
        for name in ("run", "root"):
            (directory / name).mkdir(mode=0o700)
        self._bring_pack()
        for path in (directory, *directory.rglob("*")):
            os.chown(path, self.user_id, self.user_id)
        self._skip_if_impossible()

    def _bring_pack(self) -> None:
        """A plain user's own cache, filled with what is in this one's."""
        pack = Path(guest_pack().kernel_path).parent
        shutil.copytree(pack, self.directory / ".cache/triarch/guest" / pack.name)

    def _skip_if_impossible(self) -> None:
        done = self._run((sys.executable, "-c", "import triarch"))
        if done.returncode:
            pytest.skip(f"this checkout cannot be used so: {done.stderr.strip().splitlines()[-1]}")

    @property
    def instance(self) -> Instance:
        found = instance_at(self.environment["TRIARCH_ROOT"], self.user_id)
        run_dir = found.run_dir if found.of_root else f"{self.environment['XDG_RUNTIME_DIR']}/triarch-{found.tag}"
        return msgspec.structs.replace(found, run_dir=run_dir)

    def _run(self, argv: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._prefix, *argv],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def triarch(self, *arguments: str, code: int = 0) -> str:
        """What the command wrote; nothing ever ends in a traceback."""
        done = self._run(tuple(triarch_argv(*arguments)))
        said = f"triarch {' '.join(arguments)}: {done.stdout}{done.stderr}"
        assert "Traceback" not in said, said
        assert done.returncode == code, said
        return done.stdout if code in (0, 42) else done.stderr

    def machine(self, name: str) -> MachineView:
        return msgspec.json.decode(self.triarch("info", name, "-o", "json"), type=MachineView)

    def checks(self) -> dict[str, Check]:
        done = self._run(tuple(triarch_argv("doctor", "-o", "json")))
        assert "Traceback" not in done.stderr, done.stderr
        return {check.name: check for check in msgspec.json.decode(done.stdout, type=tuple[Check, ...])}


@pytest.fixture(params=CONFINEMENTS)
def confined(request: pytest.FixtureRequest) -> Iterator[Confined]:
    # Outside of pytest's own directory, which only this user may enter, and short enough for names of sockets.
    with tempfile.TemporaryDirectory(prefix="triarch-test-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        found = Confined(Path(directory), request.param)
        instance = found.instance
        try:
            yield found
        finally:
            found.triarch("down")
        assert leaks(instance) == ()
        assert not Path(instance.run_dir).exists()


@pytest.fixture(scope="module")
def archive() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="triarch-test-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "tiny.tar"
        tree = make_tree(Path(directory) / "tree")
        with tarfile.open(path, "w") as tar:
            tar.add(tree, arcname=".")
        yield path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(port: int) -> str:
    """The page, once the guest's server has begun."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            assert time.monotonic() < deadline, "no page came over the forward"
            time.sleep(0.2)


def test_hosted_machines_work_with_few_rights(confined: Confined, archive: Path) -> None:
    confined.triarch("template", "import", "tiny", str(archive))
    port = free_port()
    confined.triarch("launch", "tiny", "web", "-p", f"{port}:80", "--", "sh", "-c", SERVE)
    web = confined.machine("web")
    assert (web.architecture, web.network, web.state) == ("hosted", "user", State.RUNNING)
    assert fetch(port) == PAGE
    assert confined.triarch("exec", "web", "--", "cat", "/www/index.html") == PAGE
    confined.triarch("exec", "web", "--", "sh", "-c", "echo kept > /root/kept")

    confined.triarch("stop", "web")
    assert confined.machine("web").state is State.STOPPED
    assert confined.triarch("run", "tiny", "--", "sh", "-c", "echo ran; exit 42", code=42) == "ran\n"
    confined.triarch("delete", "web")
    assert msgspec.json.decode(confined.triarch("list", "-o", "json")) == []


def test_what_is_missing_is_said(confined: Confined, archive: Path) -> None:
    checks = confined.checks()
    assert checks["rights"].status is CheckStatus.FAIL
    assert checks["rights"].detail.startswith(confined.expected)
    assert checks["rights"].fix
    assert checks["architecture hosted"].status is CheckStatus.PASS
    assert checks["architecture container"].status is CheckStatus.FAIL
    assert confined.expected in checks["architecture container"].detail
    assert checks["nat network"].status is CheckStatus.FAIL

    confined.triarch("template", "import", "tiny", str(archive))
    said = confined.triarch("launch", "tiny", "c", "--as", "container", code=6)
    assert confined.expected in said
    said = confined.triarch("launch", "tiny", "n", "--network", "nat", code=6)
    assert "this host allows no NAT network" in said
    assert msgspec.json.decode(confined.triarch("list", "-o", "json")) == []
