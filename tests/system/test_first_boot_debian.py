"""The first boot on Debian with its own tools, as a container and as a hosted VM."""

from __future__ import annotations

import pytest
from site_rig import Site

pytestmark = pytest.mark.slow

FILE = """\
users:
- name: joe
  ssh-keys: [ssh-ed25519 AAAAC3Nza joe@example]
  groups: [adm, ops]
  sudo: yes
  password-hash: $6$salt$hash
files:
- path: /etc/app/conf
  owner: joe:ops
  mode: 0640
  content: |
    a: 1
commands:
- systemctl --version >/root/systemd
"""
READ = """
id joe; getent passwd joe; stat -c '%a %U:%G' /etc/app/conf /home/joe/.ssh/authorized_keys /etc/sudoers.d/90-joe
cat /etc/app/conf /home/joe/.ssh/authorized_keys; getent shadow joe | cut -d: -f2; test -s /root/systemd && echo ran
"""
WANTED = """\
uid=1000(joe) gid=1000(joe) groups=1000(joe),4(adm),1001(ops)
joe:x:1000:1000::/home/joe:/bin/bash
640 joe:ops
600 joe:joe
440 root:root
a: 1
ssh-ed25519 AAAAC3Nza joe@example
$6$salt$hash
ran
"""


@pytest.mark.parametrize("architecture", ["container", "hosted"])
def test_it_is_the_same_under_both_architectures(site: Site, architecture: str) -> None:
    path = site.root.parent / "first.yaml"
    path.write_text(FILE)
    name = f"first-{architecture}"
    site.run("launch", "bookworm", name, "--as", architecture, "--first-boot", str(path))
    assert site.run("exec", name, "--", "sh", "-c", READ) == WANTED
    site.run("delete", name, "--force")
