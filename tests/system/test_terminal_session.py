"""Real terminals: programs in them, consoles that outlive the daemon, and readers who do not read."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from container_rig import skip_without_busybox
from qemu_rig import make_tree
from site_rig import Site

from triarch.client import Client
from triarch.client.connection import connect
from triarch.client.stream import Stream, wait
from triarch.host.console_log import MAX_LOG_BYTES
from triarch.model.stream import ConsoleRequest
from triarch.testing.daemon_rig import triarch_argv
from triarch.testing.leaks import leaks

ARCHITECTURES = ["container", pytest.param("hosted", marks=pytest.mark.slow)]
ENDLESS = "while :; do seq 1 100000; done"
MIB = 1 << 20
INIT = """#!/bin/sh
echo up
exec < /dev/console > /dev/console 2>&1
# A container's first process has its terminal already, that of a VM never has one.
if (: < /dev/tty) 2>/dev/null; then own=; else own="setsid -c"; fi
while :; do $own sh -il; done
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A template whose init has a shell on the console."""
    skip_without_busybox()
    base = tmp_path_factory.mktemp("terminals")
    tree = make_tree(base / "tree")
    (tree / "sbin/init").unlink()
    (tree / "sbin/init").write_text(INIT)
    (tree / "sbin/init").chmod(0o755)
    with tarfile.open(base / "tree.tar", "w") as archive:
        archive.add(tree, ".")
    site = Site(base / "root")
    site.run("template", "import", "tiny", str(base / "tree.tar"))
    yield site
    site.run("down")
    assert leaks(site.instance) == ()


@pytest.fixture(params=ARCHITECTURES)
def machine(site: Site, request: pytest.FixtureRequest) -> Iterator[str]:
    yield from launched(site, request.param)


@pytest.fixture
def container(site: Site) -> Iterator[str]:
    yield from launched(site, "container")


def launched(site: Site, architecture: str) -> Iterator[str]:
    site.run("launch", "tiny", "web", "--as", architecture, "--network", "none")
    site.until("web", "echo ready", "ready", 120)
    yield "web"
    site.run("delete", "--force", "web")


class Terminal:
    """A shell in a terminal of tmux, with a server of its own."""

    def __init__(self, directory: Path, columns: int, rows: int) -> None:
        if shutil.which("tmux") is None:
            pytest.skip("tmux is not installed (apt-get install tmux)")
        self._tmux = ("tmux", "-S", str(directory / "tmux"), "-f", "/dev/null")
        size = ("-x", str(columns), "-y", str(rows))
        self._call("new-session", "-d", *size, "env", "PS1=> ", "TERM=screen", "sh", "-i")
        self._call("set-option", "-g", "window-size", "manual")
        self._call("resize-window", *size)

    def close(self) -> None:
        self._call("kill-server")

    def type(self, *keys: str) -> None:
        """Words as they are, and names of keys: `Enter`, `C-c`."""
        self._call("send-keys", *keys)

    def run(self, *arguments: str) -> None:
        self.type(" ".join((*arguments, "; echo ended with $?")), "Enter")

    def resize(self, columns: int, rows: int) -> None:
        self._call("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self) -> str:
        return self._call("capture-pane", "-p", "-S", "-500")

    def until(self, text: str, seconds: float = 60, count: int = 1) -> None:
        until(lambda: self.screen().count(text) >= count, seconds, lambda: f"no {text!r} on:\n{self.screen().strip()}")

    def _call(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True, timeout=30).stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path, 100, 30)
    yield terminal
    terminal.close()


def until(holds: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, complaint()
        time.sleep(0.1)


def command(site: Site, *words: str) -> list[str]:
    return triarch_argv("--root", str(site.root), *words)


def kill_daemon(site: Site) -> None:
    pid = int((Path(site.instance.run_dir) / "triarchd.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), 20, lambda: f"daemon {pid} does not die")


def test_a_program_on_a_terminal_is_resized_and_interrupted(site: Site, machine: str, terminal: Terminal) -> None:
    terminal.run(*command(site, "exec", "-t", machine, "--", "top", "-d", "1"))
    terminal.until("Load average")

    def size() -> str:
        return site.run("exec", machine, "--", "sh", "-c", "stty size < /proc/$(pidof top)/fd/0", check=False).strip()

    assert size() == "30 100"
    terminal.resize(120, 40)
    until(lambda: size() == "40 120", 20, size)
    terminal.type("C-c")
    # busybox calls it a good end.
    terminal.until("ended with 0")
    site.until(machine, "pidof top || echo none", "none", 20)


def test_job_control_works_in_a_login_shell(site: Site, machine: str, terminal: Terminal) -> None:
    terminal.run(*command(site, "shell", machine))
    terminal.until("~ #")
    terminal.type("sleep 777", "Enter")
    site.until(machine, "pidof sleep >/dev/null && echo there", "there", 30)
    terminal.type("C-z")
    terminal.until("Stopped")
    terminal.type("jobs; echo shell is $0; kill -9 %1; sleep 1; exit 7", "Enter")
    terminal.until("shell is -sh")
    terminal.until("ended with 7")


def test_the_console_outlives_the_daemon(site: Site, machine: str, terminal: Terminal) -> None:
    terminal.run(*command(site, "console", machine))
    terminal.type("Enter")
    terminal.type("echo words-$((40 + 2))", "Enter")
    terminal.until("words-42")
    kill_daemon(site)
    terminal.until("ended with")
    terminal.type("clear", "Enter")
    until(lambda: "words-42" not in terminal.screen().split("ended with")[-1], 10, terminal.screen)
    seen = terminal.screen().count("words-42")
    terminal.run(*command(site, "console", machine))
    terminal.until("words-42", count=seen + 1)
    terminal.type("echo words-$((40 + 3))", "Enter")
    terminal.until("words-43")
    terminal.type("C-]")
    terminal.until("ended with 0")


def test_a_command_ends_with_the_daemon_that_carried_it(site: Site, machine: str) -> None:
    """Its far end died too; it writes nothing, and would never find out."""
    words = command(site, "exec", machine, "--", "sh", "-c", "echo begun; sleep 888")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None and client.stdout.readline() == b"begun\n"
        kill_daemon(site)
    assert client.returncode
    site.until(machine, "ps | grep -v grep | grep -q 'sleep 888' || echo gone", "gone", 60)


def test_many_are_at_one_console(site: Site, machine: str) -> None:
    with Client(site.instance) as client:
        ends = [client.console(machine, ConsoleRequest(read_only=n == 2)) for n in range(3)]
        try:
            ends[2].send_input(b"echo never-$((1 + 1))\n")
            for typist in (0, 1):
                ends[typist].send_input(b"echo by-%d-$((20 + 3))\n" % typist)
                for end in ends:
                    text = read_until(end, b"by-%d-23" % typist)
                    assert b"never-2" not in text
        finally:
            for end in ends:
                end.close()


def read_until(stream: Stream, wanted: bytes, seconds: float = 60) -> bytes:
    text, end = b"", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < end, f"no {wanted!r} in {text[-2000:]!r}"
        wait(stream)
        text += b"".join(output.data for output in stream.receive())
    return text


@contextmanager
def stopped_client(site: Site, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A client that was stopped while it was in the middle of much output."""
    process = subprocess.Popen(command(site, *words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(100_000)
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def answers_at_once(site: Site) -> None:
    began = time.monotonic()
    with Client(site.instance) as client:
        assert client.machine("web").state == "running"
        assert client.execute("web", "echo", "hi").stdout == b"hi\n"
    assert time.monotonic() - began < 20


def test_a_stopped_reader_of_the_console_holds_up_nobody(site: Site, machine: str) -> None:
    with Client(site.instance) as client, client.console(machine) as reader:
        reader.send_input(b"while :; do seq 1 500; done\n")
        read_until(reader, b"500")
        with stopped_client(site, "console", machine), stopped_client(site, "logs", "-f", machine):
            time.sleep(1)
            answers_at_once(site)
            reader.send_input(b"\x03")
            time.sleep(0.5)
            reader.send_input(b"\x03\necho over-$((1 + 1))\n")
            read_until(reader, b"over-2", 120)


def test_a_stopped_client_of_a_command_holds_up_nobody(site: Site, container: str) -> None:
    with stopped_client(site, "exec", container, "--", "sh", "-c", ENDLESS):
        answers_at_once(site)
        site.run("pause", container)
        site.run("resume", container)
    site.until(container, "pidof seq || echo none", "none", 20)


def test_a_connection_that_says_and_reads_nothing_is_in_nobodys_way(site: Site, container: str) -> None:
    opening = b'{"command":["sh","-c","while :; do seq 1 100000; done"]}'
    silent = [connect(site.instance.socket_path, 20) for _ in range(3)]
    # The first says nothing at all, the second has half a handshake, the third asked for a flood and reads nothing.
    silent[1].sendall(b"GET /1/machines/web/exec HTTP/1.1\r\nHost: x\r\nUpgrade: websock")
    flooded = Stream(silent[2], f"/1/machines/{container}/exec", opening)
    time.sleep(1)
    answers_at_once(site)
    with Client(site.instance) as client:
        pid = client.server().pid
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists(), 20, lambda: "the daemon does not end")
    assert time.monotonic() - began < 15
    flooded.close()
    for each in silent[:2]:
        each.shutdown(socket.SHUT_RDWR)
        each.close()
    site.until(container, "pidof seq || echo none", "none", 20)


def test_a_machine_that_talks_without_end_fills_no_disk(site: Site, container: str) -> None:
    with Client(site.instance) as client, client.console(container) as end:
        end.send_input(
            b"yes 0123456789012345678901234567890123456789012345678901234567890123456789 | head -c 150000000\n"
        )
        directory = Path(site.instance.log_path(site.machine(container).uuid)).parent
        for _ in range(20):
            answers_at_once(site)
            sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
            assert all(size <= MAX_LOG_BYTES + MIB for size in sizes.values()), sizes
            assert sum(sizes.values()) < 5 * MAX_LOG_BYTES
            time.sleep(0.2)
        end.send_input(b"\x03\x03\necho over-$((1 + 1))\n")
        site.until(container, "pidof yes || echo none", "none", 60)
    until(lambda: "over-2" in site.run("logs", "--tail", "50", container), 60, lambda: "the end was not logged")


def test_logs_of_a_while(site: Site, machine: str) -> None:
    def say(word: str) -> None:
        site.run("exec", machine, "--", "sh", "-c", f"echo {word} > /dev/console")
        until(lambda: word in site.run("logs", machine), 20, lambda: f"{word} was not logged")

    say("long-ago")
    time.sleep(5)
    between = datetime.now(UTC).isoformat()
    time.sleep(5)
    say("just-now")
    kill_daemon(site)
    assert "long-ago" in site.run("logs", "--since", "1h", machine)
    late = site.run("logs", "--since", between, machine)
    assert "just-now" in late and "long-ago" not in late
    assert site.run("logs", "--tail", "1", machine).strip().endswith("just-now")
    follower = subprocess.Popen(command(site, "logs", "-f", "--tail", "0", machine), stdout=subprocess.PIPE)
    try:
        time.sleep(1)
        say("later-on")
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"later-on\r\n"
    finally:
        follower.kill()
        follower.communicate()


def test_much_output_of_a_container_comes_fast(site: Site, container: str) -> None:
    """200 MB/s: that is what the processor time of either end allows, whatever else runs on this machine."""
    size_bytes = 500 * MIB
    with Client(site.instance) as client:
        pid = client.server().pid
    before, client_before = processor_seconds(pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    words = command(site, "exec", container, "--", "dd", "if=/dev/zero", "bs=1M", f"count={size_bytes // MIB}")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client_process:
        assert client_process.stdout is not None
        received = 0
        while piece := os.read(client_process.stdout.fileno(), MIB):
            received += len(piece)
    assert (received, client_process.returncode) == (size_bytes, 0)
    client_after = resource.getrusage(resource.RUSAGE_CHILDREN)
    client_seconds = sum(client_after[:2]) - sum(client_before[:2])
    limit_seconds = size_bytes / 200e6
    assert processor_seconds(pid) - before < limit_seconds
    assert client_seconds < limit_seconds


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
