"""The OCI configuration and conmon's command line, beside files that a person has read.

`TRIARCH_UPDATE_GOLDEN=1` writes them anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.container.config import Paths, capabilities, exec_process, make_config, small_files
from triarch.drivers.container.monitor import conmon_command
from triarch.drivers.container.record import RunFiles
from triarch.drivers.container.seccomp import Argument, Condition, Profile, ProfileRule, resolve
from triarch.model.account import find_account, parse_user
from triarch.model.driver import ExecRequest, LayerFile, MachineSpec, Resize
from triarch.model.machine import IdRange, Machine
from triarch.model.network import BridgeLink, Link, Nic, NoLink
from triarch.model.resources import Resources
from triarch.model.template import Init, Layer, Template, TemplateRef

GOLDEN = Path(__file__).parent / "container"
UUID = "6f2c8a52-8f0e-4c43-9d0c-0d9b8a1f4e11"
RUN_DIR = f"/run/triarch/m/{UUID}"
DIGEST = "ab" * 32
NIC = Nic(mac="02:00:0a:4d:00:09", address="10.77.0.9/16")
BRIDGE = BridgeLink(
    bridge="tri0", host_interface="tri0m3", nic=NIC, gateway="10.77.0.1", nameserver="10.77.0.1", domain="triarch"
)
UNLIMITED = Resources()
LIMITED = Resources(cpus=1.5, memory_bytes=256 << 20, pids=200, io_weight=50)
PROFILE = Profile(
    default_action="SCMP_ACT_ERRNO",
    default_errno_ret=38,
    syscalls=(
        ProfileRule(action="SCMP_ACT_ALLOW", names=("read", "bpf", "write")),
        ProfileRule(action="SCMP_ACT_ALLOW", names=("setns", "bpf"), includes=Condition(caps=("CAP_SYS_ADMIN",))),
        ProfileRule(
            action="SCMP_ACT_ERRNO", names=("setns",), errno_ret=1, excludes=Condition(caps=("CAP_SYS_ADMIN",))
        ),
        ProfileRule(action="SCMP_ACT_ALLOW", names=("breakpoint",), includes=Condition(arches=("arm64",))),
        ProfileRule(
            action="SCMP_ACT_ALLOW",
            names=("personality",),
            args=(Argument(index=0, value=8, op="SCMP_CMP_EQ"),),
        ),
    ),
)
PATHS = Paths(
    root="/run/triarch/launcher/machine/root",
    user_namespace="/run/triarch/launcher/machine/user-namespace",
    network_namespace="/run/triarch/launcher/machine/network-namespace",
    files={name: f"/run/triarch/launcher/machine/files/{name}" for name in ("hostname", "hosts", "resolv.conf")},
)


def spec(init: Init, *, link: Link = BRIDGE, resources: Resources = UNLIMITED) -> MachineSpec:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    return MachineSpec(
        machine=Machine(
            name="web",
            uuid=UUID,
            index=3,
            template=TemplateRef(name="bookworm", level=1, digest=DIGEST),
            architecture="container",
            init=init,
            environment={"GREETING": "guten Tag"},
            resources=resources,
            ids=IdRange(base=18 << 16),
            created_at=at,
        ),
        template=Template(
            name="bookworm",
            level=1,
            digest=DIGEST,
            layers=(Layer(digest=DIGEST, size_bytes=2 << 20),),
            init=init,
            command=("/bin/sh", "-c", "echo hi"),
            environment={"LANG": "C.UTF-8"},
            created_at=at,
        ),
        layers=(LayerFile(digest=DIGEST, path=f"/var/lib/triarch/pool/layers/{DIGEST}.erofs", size_bytes=2 << 20),),
        delta_path=f"/var/lib/triarch/pool/deltas/{UUID}.raw",
        link=link,
        run_dir=RUN_DIR,
        state_dir=f"/var/lib/triarch/machines/{UUID}",
        log_path=f"/var/lib/triarch/machines/{UUID}/console.log",
        cgroup=f"/triarch-0/{UUID}",
    )


def compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("TRIARCH_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def as_json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"


@pytest.mark.parametrize("init", list(Init))
@pytest.mark.parametrize("how", ["plain", "limited", "compiled", "terminal"])
def test_config(init: Init, how: str) -> None:
    if how == "terminal" and init is Init.SYSTEM:
        pytest.skip("a machine with an init of its own always has a terminal")
    made = make_config(
        spec(init, link=NoLink() if how == "plain" else BRIDGE, resources=LIMITED if how == "limited" else UNLIMITED),
        PATHS,
        resolve(PROFILE, capabilities(init), machine="x86_64", kernel="6.1.0"),
        "QUJD" if how == "compiled" else None,
        Resize(100, 40) if how == "terminal" else None,
    )
    compare(f"config-{init.value}-{how}.json", as_json(made))


@pytest.mark.parametrize("link", [BRIDGE, NoLink()], ids=["bridge", "none"])
def test_small_files(link: Link) -> None:
    files = small_files(spec(Init.APP, link=link))
    name = "bridge" if isinstance(link, BridgeLink) else "none"
    compare(f"files-{name}.txt", "".join(f"== {file}\n{text}" for file, text in sorted(files.items())))


PASSWD = b"root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\n"
GROUP = b"tty:x:5:www-data\nwww-data:x:33:\n"


@pytest.mark.parametrize("user", [0, 33])
def test_exec_process(user: int) -> None:
    request = ExecRequest(command=("stty", "size"), terminal=True, directory="/tmp", environment={"LANG": "de"})
    account = find_account(parse_user(str(user)), PASSWD, GROUP)
    compare(f"exec-user-{user}.json", as_json(exec_process(spec(Init.SYSTEM), request, account)))


@pytest.mark.parametrize(("terminal", "attached"), [(True, False), (False, True), (False, False)])
def test_conmon_command(terminal: bool, attached: bool) -> None:
    words = conmon_command(
        "/usr/bin/conmon",
        "/usr/bin/crun",
        UUID,
        RunFiles(run_dir=Path(RUN_DIR)),
        "/var/lib/triarch/machines/log",
        terminal=terminal,
        attached=attached,
    )
    name = "terminal" if terminal else "attached" if attached else "detached"
    compare(f"conmon-{name}.txt", "".join(f"{word}\n" for word in words))
