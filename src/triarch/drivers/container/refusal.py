"""What crun says of commands that it cannot run, in a shell's terms."""

from __future__ import annotations

from triarch.errors import MachineFailed
from triarch.host.launcher.protocol import CREATE_STEP
from triarch.model.driver import MachineSpec
from triarch.model.machine import Exit
from triarch.model.template import Init

_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


class CommandRefused(MachineFailed):
    """There is no such command in the machine, or it may not be run; `meaning` is how a shell would have ended."""

    def __init__(self, message: str, meaning: Exit, *, machine: str) -> None:
        super().__init__(message, machine=machine)
        self.meaning = meaning


def refusal(text: str) -> Exit | None:
    """How a shell would have ended; None when crun's words are about more than the command."""
    if "No such file" in text or "not found" in text:
        return Exit(code=_NOT_FOUND, reason=text)
    if "ermission denied" in text or "not permitted" in text or "not executable" in text:
        return Exit(code=_NOT_EXECUTABLE, reason=text)
    return None


def failed_start(error: MachineFailed, spec: MachineSpec) -> MachineFailed:
    """`error` of the launcher, which knows no names, in the machine's terms: `CommandRefused` where that is why."""
    name = spec.machine.name
    if error.fields.get("step") == CREATE_STEP and spec.machine.init is Init.APP and "executable" in error.message:
        meaning = refusal(error.message)
        if meaning is not None:
            reason = error.message.removeprefix(f"cannot {CREATE_STEP}: ")
            return CommandRefused(f"machine '{name}' cannot run '{spec.command[0]}': {reason}", meaning, machine=name)
    return MachineFailed(f"machine '{name}' did not start: {error.message}", machine=name)
