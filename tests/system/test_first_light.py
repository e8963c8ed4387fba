"""One real Debian machine, run as a container and as a hosted VM from the same two files, through the command line."""

from __future__ import annotations

import subprocess

import msgspec
import pytest
from site_rig import Site

from triarch.testing.daemon_rig import triarch_argv

pytestmark = pytest.mark.slow

# Written under one architecture and read under the other: links, owners, modes, a name that hides the template's, an
# extended attribute that only root may see, a fifo, a hole.
WRITE = """
set -e
echo hi > /root/x; ln /root/x /root/y; chown 33:33 /root/x; chmod 4711 /root/y
rm /etc/motd; rm -r /usr/share/doc; mkdir /usr/share/doc; echo ours > /usr/share/doc/ours
mkfifo -m 0640 /root/fifo; ln -s /nowhere /root/link; truncate -s 10M /root/hole
setcap cap_net_raw+ep /root/x 2>/dev/null || true
sync
"""
READ = """
stat -c '%n %u:%g %a %h %F %s' /root/x /root/y /root/fifo /root/link /root/hole
stat -c '%n %u:%g %a' /etc/passwd /var/lib/apt/lists /tmp /usr/bin/passwd
ls /usr/share/doc; cat /root/x; ls -d /etc/motd 2>/dev/null || echo no motd
"""


def test_the_same_two_files_under_both_architectures(site: Site) -> None:
    site.run("launch", "bookworm", "a", "--as", "container")
    site.until("a", "systemctl is-system-running", "running", 60)
    before = site.machine("a")
    delta = (site.root / f"pool/deltas/{before.uuid}.raw").stat()
    site.run("exec", "a", "--", "sh", "-c", WRITE)
    as_container = site.run("exec", "a", "--", "sh", "-c", READ)
    host_kernel = site.run("exec", "a", "--", "uname", "-r")
    assert site.run("exec", "a", "--", "stat", "-c", "%u %h", "/root/x") == "33 2\n"

    site.run("switch", "a", "--to", "hosted")
    assert site.run("exec", "a", "--", "stat", "-c", "%u %h", "/root/x") == "33 2\n"
    assert site.run("exec", "a", "--", "sh", "-c", READ) == as_container
    assert site.run("exec", "a", "--", "uname", "-r") != host_kernel
    site.until("a", "systemctl is-system-running", "running", 120)
    after = site.machine("a")
    assert (after.architecture, after.address, after.mac) == ("hosted", before.address, before.mac)
    site.run("exec", "a", "--", "sh", "-c", "echo from the VM >> /root/y")

    site.run("stop", "a")
    site.check_disks("a")
    site.run("switch", "a", "--to", "container")
    site.run("start", "a")
    assert site.run("exec", "a", "--", "cat", "/root/x") == "hi\nfrom the VM\n"
    site.run("kill", "a")
    site.check_disks("a")
    now = (site.root / f"pool/deltas/{before.uuid}.raw").stat()
    assert (now.st_ino, now.st_size) == (delta.st_ino, delta.st_size)
    site.run("delete", "a")


def test_machines_find_each_other_by_name_across_architectures(site: Site) -> None:
    site.run("launch", "bookworm", "web", "--as", "hosted")
    site.run("launch", "bookworm", "db", "--as", "container")
    site.until("db", "ping -c1 -W2 web >/dev/null && echo reached", "reached", 60)
    site.until("web", "ping -c1 -W2 db.triarch >/dev/null && echo reached", "reached", 60)
    for name in ("web", "db"):
        assert site.run("exec", name, "--", "hostname").strip() == name
    site.run("delete", "--force", "web", "db")


def test_a_system_machine_has_an_identity_of_its_own(site: Site) -> None:
    for name in ("one", "two"):
        site.run("launch", "bookworm", name, "--as", "container")
        site.until(name, "systemctl is-system-running", "running", 60)
    one, two = (site.run("exec", name, "--", "cat", "/etc/machine-id") for name in ("one", "two"))
    assert len(one.strip()) == len(two.strip()) == 32
    assert one != two
    site.run("restart", "one")
    site.until("one", "systemctl is-system-running", "running", 60)
    assert site.run("exec", "one", "--", "cat", "/etc/machine-id") == one
    site.run("delete", "--force", "one", "two")


def test_run_passes_the_exit_code_under_both_architectures(site: Site) -> None:
    for architecture in ("container", "hosted"):
        done = subprocess.run(
            triarch_argv(
                "--root",
                str(site.root),
                "run",
                "bookworm",
                "--as",
                architecture,
                "--",
                "sh",
                "-c",
                "cat; echo no >&2; exit 42",
            ),
            input=b"given\n",
            capture_output=True,
            timeout=200,
            check=False,
        )
        assert (done.returncode, done.stdout) == (42, b"given\n"), done
        assert b"no\n" in done.stderr
    assert msgspec.json.decode(site.run("list", "-o", "json")) == []


def test_kvm_is_there_or_says_why_not(site: Site) -> None:
    listed = site.run("doctor", "-o", "json", check=False)
    kvm = next(check for check in msgspec.json.decode(listed) if check["name"] == "architecture kvm")
    if kvm["status"] != "pass":
        assert "KVM" in kvm["detail"] or "/dev/kvm" in kvm["detail"]
        said = subprocess.run(
            triarch_argv("--root", str(site.root), "launch", "bookworm", "k", "--as", "kvm"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert said.returncode == 6 and "architecture 'kvm' cannot run here" in said.stderr
        assert "Traceback" not in said.stderr
