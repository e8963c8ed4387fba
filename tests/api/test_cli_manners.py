"""The command line as people and scripts use it, on the fake architecture."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.testing.daemon_rig import DaemonRig, triarch_argv


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(tmp_path_factory.mktemp("instance"), machines=3) as rig:
        launched = rig.run("launch", "tiny", "web", "--network", "none")
        assert launched.returncode == 0, launched.stderr
        yield rig


def out(rig: DaemonRig, *words: str, code: int = 0) -> str:
    """Standard output of one command that ends with `code`."""
    done = rig.run(*words)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode()


def complaint(rig: DaemonRig, *words: str, code: int) -> str:
    done = rig.run(*words)
    assert done.returncode == code, done.stderr.decode()
    return done.stderr.decode()


# -- lists


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        (["state=running"], "web"),
        (["state!=running"], "m0001 m0002 m0003"),
        (["m000[12]"], "m0001 m0002"),
        (["m*", "web"], ""),
        (["state=running,stopped", "web,m0003"], "m0003 web"),
        (["arch=hosted"], ""),
        (["label.role=x"], ""),
    ],
)
def test_filters(rig: DaemonRig, filters: list[str], names: str) -> None:
    assert out(rig, "list", "-q", *filters).split() == names.split()


def test_columns_and_order(rig: DaemonRig) -> None:
    assert out(rig, "list", "--columns", "name,state", "-o", "csv", "--sort", "-name").splitlines() == [
        "name,state",
        "web,running",
        "m0003,stopped",
        "m0002,stopped",
        "m0001,stopped",
    ]
    found = json.loads(out(rig, "list", "web", "--columns", "name,disk,label.role", "-o", "json"))
    assert found == [{"name": "web", "disk": str(10 << 30), "label.role": ""}]
    assert out(rig, "template", "list", "-q", "--sort", "name").split() == ["app@1", "tiny@1"]
    assert "container" not in out(rig, "architecture", "list", "available=yes", "-q")
    assert "fake" in out(rig, "architecture", "list", "--columns", "name,capabilities")


def test_an_unknown_column_lists_those_there_are(rig: DaemonRig) -> None:
    said = complaint(rig, "list", "--columns", "nmae", code=2)
    assert "there is no column 'nmae', did you mean 'name'?" in said and "template" in said
    assert "there is no column 'stat'" in complaint(rig, "list", "stat=running", code=2)


# -- typos


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("lunch tiny x", "launch"),
        ("template lst", "list"),
        ("architecture lits", "list"),
        ("list --colums name", "--columns"),
        ("info wbe", "did you mean 'web'"),
        ("launch tinny x", "did you mean 'tiny'"),
    ],
)
def test_typos_are_answered_with_what_was_meant(rig: DaemonRig, line: str, meant: str) -> None:
    done = rig.run(*line.split())
    assert done.returncode in (2, 3) and meant in done.stderr.decode()


# -- exit codes


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("list --nonsense", 2),
        ("create tiny Bad_Name", 2),
        ("info nobody", 3),
        ("template info nothing", 3),
        ("start web", 4),
        ("create tiny web", 4),
        ("delete web", 4),
        ("delete nobody nothing", 3),
        ("delete nobody web", 1),
        ("wait --state stopped web --timeout 0.2", 124),
        ("exec nobody -- true", 125),
        ("exec m0001 -- true", 125),
        ("exec web -- nonsense", 127),
        ("exec web sh -c 'exit 3'", 3),
        ("run nothing -- true", 125),
    ],
)
def test_exit_codes(rig: DaemonRig, line: str, code: int) -> None:
    import shlex

    assert rig.run(*shlex.split(line)).returncode == code


def test_help_knows_commands_and_topics(rig: DaemonRig) -> None:
    assert "124  It did not happen in the stated time." in out(rig, "help", "exit-codes")
    assert out(rig, "help", "template", "build").startswith("Usage: triarch template build")
    assert "did you mean 'launch'" in complaint(rig, "help", "lanch", code=2)
    assert out(rig, "help") == out(rig, "--help")


# -- what destroys


def test_a_dry_run_says_what_would_go_and_changes_nothing(rig: DaemonRig) -> None:
    before = out(rig, "list", "-o", "json")
    assert out(rig, "delete", "--dry-run", "m0001", "m0002").splitlines() == [
        "would delete machine m0001 (stopped, tiny@1)",
        "would delete machine m0002 (stopped, tiny@1)",
    ]
    assert "it is running" in complaint(rig, "delete", "--dry-run", "web", code=4)
    assert "would delete machine web" in out(rig, "delete", "--dry-run", "--force", "web")
    assert out(rig, "kill", "--dry-run", "web") == "would kill machine web, which is running\n"
    assert out(rig, "template", "delete", "--dry-run", "app") == "would delete template app (1 level, 2.0 MiB)\n"
    assert "is in use by 'm0001'" in complaint(rig, "template", "delete", "--dry-run", "tiny", code=4)
    assert "would stop machine web\n" in out(rig, "down", "--dry-run")
    assert out(rig, "list", "-o", "json") == before


# -- Ctrl-C


def interrupted(rig: DaemonRig, *words: str, after: float = 2.0) -> tuple[int, str]:
    """Exit code and standard error of a command that gets Ctrl-C while it waits."""
    process = subprocess.Popen(
        triarch_argv(*words), env=rig.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_ctrl_c_undoes_what_was_asked_for_and_says_so(rig: DaemonRig) -> None:
    code, said = interrupted(rig, "launch", "tiny", "slow", "--network", "none", "-e", "fake.start-seconds=20")
    assert code == 130
    assert "cancelling launch slow, press Ctrl-C again" in said and "launch slow: cancelled and undone" in said
    assert "there is no machine 'slow'" in complaint(rig, "info", "slow", code=3)


def test_ctrl_c_of_a_wait_only_detaches_and_says_so(rig: DaemonRig) -> None:
    launch = subprocess.Popen(
        triarch_argv("launch", "tiny", "late", "--network", "none", "-e", "fake.start-seconds=6"),
        env=rig.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1.5)
    code, said = interrupted(rig, "wait", "late")
    assert code == 130 and "detached; launch late goes on: triarch wait " in said
    assert launch.wait(30) == 0
    assert out(rig, "wait", "--state", "running", "late", "--timeout", "20") == ""
    assert rig.run("delete", "-f", "late").returncode == 0


def test_ctrl_c_of_exec_ends_the_command_and_says_so(rig: DaemonRig) -> None:
    code, said = interrupted(rig, "exec", "-T", "-n", "web", "--", "sleep", "30")
    assert (code, said.strip()) == (130, "interrupted; what it ran in the machine is ended")


# -- waiting


def test_wait_for_health_needs_a_check(rig: DaemonRig) -> None:
    assert "has no health check" in complaint(rig, "wait", "--healthy", "web", code=2)
    assert "is stopped" in complaint(rig, "wait", "--healthy", "m0001", code=1)


# -- every verb that nothing else runs


def test_the_verbs_of_a_running_machine(rig: DaemonRig) -> None:
    assert rig.run("launch", "app", "job", "--network", "none").returncode == 0
    assert out(rig, "logs", "job") == "hello\n"
    for verb, state in (("pause", "paused"), ("resume", "running"), ("restart", "running"), ("kill", "stopped")):
        assert out(rig, verb, "job") == ""
        assert out(rig, "list", "job", "--columns", "state", "-o", "csv") == f"state\n{state}\n", verb
    out(rig, "rename", "job", "task")
    out(rig, "start", "task")
    out(rig, "stop", "task", "--timeout", "5")
    out(rig, "delete", "task")


def test_console_ends_with_the_machine(rig: DaemonRig) -> None:
    command = ("sh", "-c", "echo hello; sleep 4")
    assert rig.run("launch", "app", "brief", "--network", "none", "--", *command).returncode == 0
    assert "hello" in out(rig, "console", "brief")
    out(rig, "wait", "--state", "stopped", "brief", "--timeout", "20")
    out(rig, "delete", "brief")


def test_versions(rig: DaemonRig) -> None:
    assert json.loads(out(rig, "version", "-o", "json"))["server"]["tag"] == rig.instance.tag


def test_events_follow_what_happens(rig: DaemonRig) -> None:
    process = subprocess.Popen(
        triarch_argv("events", "-o", "json"), env=rig.environment, stdout=subprocess.PIPE, text=True
    )
    try:
        time.sleep(2)
        assert rig.run("pause", "web").returncode == 0
        assert rig.run("resume", "web").returncode == 0
    finally:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    kinds = [json.loads(line)["kind"] for line in said.splitlines()]
    assert {"machine-paused", "machine-resumed"} <= set(kinds)


def test_a_template_goes(rig: DaemonRig, tmp_path: Path) -> None:
    root = tmp_path / "tree"
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text('PRETTY_NAME="Little 1"\n')
    archive = shutil.make_archive(str(tmp_path / "little"), "tar", root)
    assert "template little@1" in out(rig, "template", "import", "little", archive)
    out(rig, "template", "delete", "little")


# -- completion


def completions(rig: DaemonRig, tmp_path: Path, *words: str) -> list[str]:
    """What a real bash offers for the last of the words."""
    program = tmp_path / "triarch"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m triarch "$@"\n')
    program.chmod(0o755)
    script = f"""
        eval "$({sys.executable} -m triarch completion bash)"
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        COMP_CWORD={len(words) - 1}
        _triarch_completion triarch
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**rig.environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("triarch start m000", ["m0001", "m0002", "m0003"]),
        ("triarch exec we", ["web"]),
        ("triarch list ", ["m0001", "m0002", "m0003", "web"]),
        ("triarch list --columns name,sta", ["name,state", "name,started"]),
        ("triarch launch ", ["app", "tiny"]),
        ("triarch template delete t", ["tiny"]),
        ("triarch switch web --to f", ["fake"]),
        ("triarch temp", ["template"]),
        ("triarch template b", ["build"]),
        ("triarch wait we", ["web"]),
        ("triarch help exit", ["exit-codes"]),
    ],
)
def test_bash_completes_names(rig: DaemonRig, tmp_path: Path, line: str, offered: list[str]) -> None:
    assert completions(rig, tmp_path, *line.split(" ")) == offered


def test_completion_without_a_daemon_offers_nothing_and_starts_none(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TRIARCH_ROOT": str(tmp_path / "none"),
        "_TRIARCH_COMPLETE": "bash_complete",
        "COMP_WORDS": "triarch start ",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(triarch_argv(), env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_sound(rig: DaemonRig, tmp_path: Path, shell: str) -> None:
    script = tmp_path / f"triarch.{shell}"
    script.write_text(out(rig, "completion", shell))
    assert "_TRIARCH_COMPLETE" in script.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed, so nothing can check its script")
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
