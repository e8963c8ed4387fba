"""An instance that is driven through the command line alone, with one Debian template."""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

import msgspec

from triarch.model.instance import Instance, instance_at
from triarch.model.machine import MachineView
from triarch.model.template import Template
from triarch.testing.daemon_rig import triarch_argv


class Site:
    """One instance. Every method fails the test when the command line does."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instance: Instance = instance_at(root)

    def run(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            triarch_argv("--root", str(self.root), *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert not check or done.returncode == 0, f"triarch {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def machine(self, name: str) -> MachineView:
        return msgspec.json.decode(self.run("info", name, "-o", "json"), type=MachineView)

    def layer(self) -> tuple[Path, str]:
        template = msgspec.json.decode(self.run("template", "info", "bookworm", "-o", "json"), type=Template)
        return self.root / f"pool/layers/{template.layers[0].digest}.erofs", template.layers[0].digest

    def check_disks(self, name: str) -> None:
        """The stopped machine's delta is clean without any mending, and the template is what it was."""
        delta = self.root / f"pool/deltas/{self.machine(name).uuid}.raw"
        assert "needs_recovery" not in subprocess.check_output(["dumpe2fs", "-h", delta], text=True)
        subprocess.run(["e2fsck", "-fn", delta], check=True, capture_output=True)
        path, digest = self.layer()
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest

    def until(self, name: str, script: str, expected: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (said := self.run("exec", name, "--", "sh", "-c", script, check=False).strip()) != expected:
            assert time.monotonic() < end, f"{script}: {said!r} is not {expected!r}"
            time.sleep(0.5)
