"""The daemon as a process: its socket, its lock, its end, its start by systemd and by the command line, its speed."""

from __future__ import annotations

import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triarch.model.machine import CreateMachine
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.testing.daemon_rig import SYSTEM_TEMPLATE, DaemonRig


def test_only_root_and_the_group_reach_the_socket(rig: DaemonRig) -> None:
    assert stat.S_IMODE(rig.instance.socket_path.stat().st_mode) == 0o660


def test_a_second_daemon_refuses_and_names_the_first(rig: DaemonRig) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "triarch.daemon"], env=rig.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"another triarchd (pid {rig.pid})" in done.stderr and "Traceback" not in done.stderr
    assert f"triarch --root {rig.instance.state_dir} down" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_machines_outlive_the_daemon(tmp_path: Path, number: signal.Signals) -> None:
    with DaemonRig(tmp_path) as rig:
        with rig.client() as client:
            request = CreateMachine(
                template=SYSTEM_TEMPLATE, name="stays", settings=Settings(network="none"), start=True
            )
            client.finish(client.create(request))
        assert rig.stop(number) == (-signal.SIGKILL if number is signal.SIGKILL else 0)
        assert rig.instance.socket_path.exists() is (number is signal.SIGKILL)
        rig.start()
        with rig.client() as client:
            assert client.machine("stays").state is State.RUNNING
            assert client.execute("stays", "echo", "hi").stdout == b"hi\n"


def test_down_ends_the_daemon_and_again_is_success(tmp_path: Path) -> None:
    with DaemonRig(tmp_path) as rig:
        assert rig.run("down").returncode == 0
        assert rig.stop() in (0, -signal.SIGTERM)
        assert not rig.instance.socket_path.exists()
        assert rig.run("down").returncode == 0


def test_systemd_passes_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with DaemonRig(tmp_path / "root") as rig, socket.socket(socket.AF_UNIX) as listener:
        rig.stop()
        listener.bind(str(path))
        listener.listen()
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
            "os.execv(sys.executable, [sys.executable, '-m', 'triarch.daemon'])"
        )
        fd = listener.fileno()
        process = subprocess.Popen([sys.executable, "-c", code, str(fd)], env=rig.environment, pass_fds=(fd,))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(path))
            client.sendall(b"GET /1 HTTP/1.1\r\nHost: t\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        process.terminate()
        assert process.wait(30) == 0
        assert path.exists()


def test_the_command_line_starts_a_daemon_and_two_at_once_share_it(tmp_path: Path) -> None:
    with DaemonRig(tmp_path) as rig:
        rig.stop()
        argv = [sys.executable, "-m", "triarch", "template", "list"]
        both = [subprocess.Popen(argv, env=rig.environment, stdout=subprocess.PIPE) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0] and outputs[0] == outputs[1] != b""
        assert rig.run("down").returncode == 0


def test_a_relative_root_is_the_callers_and_not_the_daemons(tmp_path: Path) -> None:
    with DaemonRig(tmp_path / "root") as rig:
        rig.stop()
        argv = [sys.executable, "-m", "triarch", "--root", "root", "version", "-o", "json"]
        subprocess.run([*argv[:5], "template", "list"], env=rig.environment, cwd=tmp_path, check=True)
        assert subprocess.check_output(argv, env=rig.environment, cwd=tmp_path).count(bytes(rig.root)) == 1
        assert rig.run("down").returncode == 0


def test_an_instance_never_used_is_listed_without_a_daemon(tmp_path: Path) -> None:
    rig = DaemonRig(tmp_path / "never")
    for command in (("list",), ("template", "list"), ("down",), ("version",)):
        assert rig.run(*command).returncode == 0
    assert not Path(rig.instance.run_dir).exists() and not rig.root.exists()


@pytest.mark.parametrize(("machines", "limit_ms"), [(100, 5), (1000, 20)])
def test_lists_are_fast(tmp_path: Path, machines: int, limit_ms: float) -> None:
    with DaemonRig(tmp_path, machines=machines) as rig, rig.client() as client:
        client.server()
        times = []
        for _ in range(30):
            began = time.perf_counter()
            body = client.request_raw("/1/machines")
            times.append((time.perf_counter() - began) * 1000)
        assert body.count(b'"uuid"') == machines
        assert min(times) <= limit_ms, f"{min(times):.1f} ms"
