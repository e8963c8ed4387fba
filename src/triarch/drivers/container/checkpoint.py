"""Whether a container's memory could be kept, as CRIU does it: tried, so that the refusal says what is missing."""

from __future__ import annotations

from triarch.errors import CommandFailed, MissingProgram, Unsupported
from triarch.host.process import run_async
from triarch.model.driver import MachineSpec
from triarch.model.template import Init

_FEATURE = "+CRIU"


async def check_checkpoint(spec: MachineSpec) -> None:
    """Raises `Unsupported` with the first thing that is in the way: init, program, kernel, runtime, this driver."""
    raise Unsupported(
        f"the memory of container '{spec.machine.name}' cannot be kept: {await _obstacle(spec)}",
        hint=f"triarch switch {spec.machine.name} --to hosted",
        machine=spec.machine.name,
    )


async def _obstacle(spec: MachineSpec) -> str:
    if spec.machine.init is Init.SYSTEM:
        return "it boots an init of its own, whose nested namespaces CRIU cannot dump"
    try:
        await run_async(["criu", "check"])
    except MissingProgram:
        return "CRIU is not installed"
    except CommandFailed as error:
        said = error.stderr_tail.splitlines() or [f"exit code {error.returncode}"]
        return f"CRIU does not work on this kernel: {said[-1].strip()}"
    version = (await run_async(["crun", "--version"])).decode(errors="replace")
    if _FEATURE not in version.split():
        return f"{version.splitlines()[0]} was built without CRIU"
    return "this version of Triarch does not drive crun's checkpoints"
