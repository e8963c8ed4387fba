"""The command line of QEMU, argument by argument: any change to it shows here."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.qemu.cmdline import Accelerator, Headroom, Wiring, guest_config, qemu_argv
from triarch.guest.protocol import kernel_command_line
from triarch.model.driver import GuestPack, LayerFile, MachineSpec
from triarch.model.machine import IdRange, Machine
from triarch.model.network import BridgeLink, Forward, Link, Nic, NoLink, UserLink
from triarch.model.resources import Resources
from triarch.model.template import Init, Template, TemplateRef

GOLDEN = Path(__file__).parent
ROOM = Headroom(processors=1, memory_bytes=1 << 30)
NIC = Nic(mac="02:54:72:00:00:07", address="10.77.0.7/16")
BRIDGE = BridgeLink(
    bridge="tri0", host_interface="tri0m7", nic=NIC, gateway="10.77.0.1", nameserver="10.77.0.1", domain="triarch"
)
USER = UserLink(nic=NIC, forwards=(Forward(host_port=8080, machine_port=80),))


def spec_of(link: Link, layers: int, init: Init, resources: Resources) -> MachineSpec:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    files = tuple(
        LayerFile(digest=str(n) * 64, path=f"/pool/layers/{n}.erofs", size_bytes=(64 << 20) * (n + 1))
        for n in range(layers)
    )
    template = Template(name="bookworm", level=1, digest="a" * 64, layers=(), init=init, created_at=now)
    machine = Machine(
        name="web",
        uuid="0b5f6f0e-7f0a-4f0e-9d2b-1f7a5f0c9a11",
        index=7,
        template=TemplateRef(name="bookworm", level=1, digest="a" * 64),
        architecture="hosted",
        init=init,
        command=("true",) if init is Init.APP else (),
        resources=resources,
        ids=IdRange(base=1507328),
        created_at=now,
    )
    return MachineSpec(
        machine=machine,
        template=template,
        layers=files,
        delta_path="/pool/deltas/web.raw",
        link=link,
        run_dir="/run/triarch/m/web",
        state_dir="/var/lib/triarch/machines/web",
        log_path="/var/lib/triarch/machines/web/console.log",
        cgroup="/triarch-0/web",
        guest_pack=GuestPack(
            kernel_path="/cache/vmlinux",
            initrd_path="/cache/initrd",
            modules_path="/cache/modules.erofs",
            kernel_release="6.1",
        ),
    )


def wiring_of(spec: MachineSpec) -> Wiring:
    layers = tuple(range(20, 20 + len(spec.layers)))
    tap = 30 if isinstance(spec.link, BridgeLink) else None
    return Wiring(
        kernel=4,
        initrd=5,
        config=6,
        delta=3,
        log=7,
        report=8,
        monitor=9,
        console=10,
        agent=11,
        control=12,
        layers=layers,
        modules=13 if spec.machine.init is Init.SYSTEM else None,
        tap=tap,
    )


CASES = {
    "system-bridge": (spec_of(BRIDGE, 2, Init.SYSTEM, Resources()), Accelerator.TCG),
    "app-user": (spec_of(USER, 1, Init.APP, Resources(cpus=1.5, memory_bytes=300_000_000)), Accelerator.TCG),
    "app-none-kvm": (spec_of(NoLink(), 1, Init.APP, Resources(cpus=4)), Accelerator.KVM),
}


@pytest.mark.parametrize("name", CASES)
def test_command_line(name: str) -> None:
    spec, accelerator = CASES[name]
    config = guest_config(spec, b"secret-host-key", "ssh-ed25519 client")
    argv = list(qemu_argv(spec, config, wiring_of(spec), accelerator, ROOM))
    append = argv.index("-append") + 1
    assert argv[append] == kernel_command_line(config)
    argv[append] = "KERNEL-ARGUMENTS"
    golden = GOLDEN / f"qemu-{name}.txt"
    # One option with its value per line.
    text = "".join(
        ("\n" if word.startswith("-") else " ") + shlex.quote(word) if at else word for at, word in enumerate(argv)
    )
    assert text + "\n" == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_no_secret_and_no_host_path_is_on_the_command_line(name: str) -> None:
    spec, accelerator = CASES[name]
    secret = msgspec.structs.replace(
        spec, machine=msgspec.structs.replace(spec.machine, environment={"PASSWORD": "hunter2"})
    )
    config = guest_config(secret, b"secret-host-key", "ssh-ed25519 client")
    joined = " ".join(qemu_argv(secret, config, wiring_of(secret), accelerator, ROOM))
    for hidden in ("hunter2", "secret-host-key", "ssh-ed25519", "/pool", "/run", "/var", "/cache"):
        assert hidden not in joined
