"""Which virtual hardware a VM's guest sees, in the words of its own kernel."""

from __future__ import annotations

from triarch.errors import Failed
from triarch.guest.agent import Agent
from triarch.guest.devices import hardware_row
from triarch.model.device import HardwareInfo

_MAX_REPORT_BYTES = 64 << 10
_MAX_TEXT = 200
# The version that pvh/enlighten.c of Linux writes down, where no boot loader did.
_PVH_BOOT_PROTOCOL = "0x020c"
_NAMES = {
    "KVMKVMKVM": "KVM",
    "TCGTCGTCGTCG": "QEMU, translated code",
    "XenVMMXenVMM": "Xen",
    "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware",
}


async def ask_hardware(agent: Agent, name: str) -> HardwareInfo:
    """Ask the guest's init. Raises `Failed`, `TimedOut` or `Unavailable`."""
    answer = await agent.ask(f"d:{hardware_row().decode()}")
    if answer.code != 0:
        raise Failed(f"machine '{name}' does not tell which hardware it sees", machine=name)
    return parse_hardware(answer.output[:_MAX_REPORT_BYTES])


def parse_hardware(report: bytes) -> HardwareInfo:
    """What `hardware` of `init/devices.c` says; hostile input, of which nothing but known words is taken as such."""
    lines = [line.split(" ", 1) for line in report.decode(errors="replace").splitlines()]
    said = {key: _printable(rest[0]) if rest else "" for key, *rest in lines}
    bound = [_printable(rest[0]).split() for key, *rest in lines if key in ("net", "block") and rest]
    # Memory with a filesystem on it is no I/O.
    drivers = {words[0]: words[1] for words in bound if len(words) == 2 and words[1] != "nd_pmem"}
    detail = [
        f"hypervisor: {_NAMES.get(said.get('hypervisor', ''), said.get('hypervisor') or 'none')}",
        f"clock: {said.get('clock', 'unknown')}",
        *(f"{device}: {driver}" for device, driver in sorted(drivers.items())),
    ]
    return HardwareInfo(
        kernel=_kernel(said),
        drivers=tuple(sorted({_family(each) for each in drivers.values()})),
        detail=", ".join(detail),
    )


def _kernel(said: dict[str, str]) -> tuple[str, ...]:
    found = []
    if said.get("boot-protocol") == _PVH_BOOT_PROTOCOL:
        found.append("pvh")
    clocks = said.get("clocks", "").split()
    if "kvm-clock" in clocks:
        found.append("kvmclock")
    if "xen" in clocks or said.get("xen"):
        found.append("xen")
    return tuple(found) or ("none",)


def _family(driver: str) -> str:
    if driver.startswith("virtio"):
        return "virtio"
    return "xen" if driver in ("vif", "vbd") or driver.startswith("xen") else "emulated"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_TEXT]).strip()
