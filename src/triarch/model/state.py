"""The two axes of a machine: its stable state, and what an observation says of it now."""

from __future__ import annotations

from enum import StrEnum

from triarch.errors import WrongState


class State(StrEnum):
    """Stable and stored. The operation that is changing it is a separate record."""

    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"


class Status(StrEnum):
    """What a driver sees when it asks the host. Never stored."""

    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"
    UNKNOWN = "unknown"


class Verb(StrEnum):
    """What can be done to a machine that exists; the same word in driver, REST, CLI and event."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    KILL = "kill"
    PAUSE = "pause"
    RESUME = "resume"
    DELETE = "delete"
    RENAME = "rename"
    SWITCH = "switch"
    EXEC = "exec"
    CONSOLE = "console"


_S, _R, _P, _F = State.STOPPED, State.RUNNING, State.PAUSED, State.FAILED

# None: the machine is gone afterwards.
TRANSITIONS: dict[tuple[State, Verb], State | None] = {
    (_S, Verb.START): _R,
    (_F, Verb.START): _R,
    (_R, Verb.STOP): _S,
    (_R, Verb.RESTART): _R,
    (_R, Verb.KILL): _S,
    (_P, Verb.KILL): _S,
    (_R, Verb.PAUSE): _P,
    (_P, Verb.RESUME): _R,
    (_S, Verb.DELETE): None,
    (_F, Verb.DELETE): None,
    (_S, Verb.RENAME): _S,
    (_F, Verb.RENAME): _F,
    (_S, Verb.SWITCH): _S,
    (_F, Verb.SWITCH): _S,
    (_R, Verb.SWITCH): _R,
    (_R, Verb.EXEC): _R,
    (_R, Verb.CONSOLE): _R,
}

_HINTS = {
    (_R, Verb.DELETE): "triarch stop {name}",
    (_P, Verb.DELETE): "triarch kill {name}",
    (_R, Verb.RENAME): "triarch stop {name}",
    (_S, Verb.EXEC): "triarch start {name}",
    (_F, Verb.EXEC): "triarch start {name}",
    (_S, Verb.CONSOLE): "triarch logs {name}",
    (_F, Verb.CONSOLE): "triarch logs {name}",
    (_S, Verb.RESTART): "triarch start {name}",
    (_F, Verb.RESTART): "triarch start {name}",
    (_P, Verb.EXEC): "triarch resume {name}",
    (_P, Verb.CONSOLE): "triarch resume {name}",
    (_P, Verb.STOP): "triarch resume {name}",
    (_P, Verb.RESTART): "triarch resume {name}",
    (_P, Verb.SWITCH): "triarch resume {name}",
    (_P, Verb.START): "triarch resume {name}",
    (_P, Verb.RENAME): "triarch kill {name}",
}
_PHRASES = {Verb.EXEC: "run a command in", Verb.CONSOLE: "attach to the console of"}


def next_state(name: str, state: State, verb: Verb) -> State | None:
    """The state after `verb` succeeds (None: gone). Raises `WrongState` that names the states the verb needs."""
    if (state, verb) in TRANSITIONS:
        return TRANSITIONS[state, verb]
    needed = " or ".join(sorted(s.value for (s, v) in TRANSITIONS if v is verb))
    hint = _HINTS.get((state, verb))
    raise WrongState(
        f"cannot {_PHRASES.get(verb, verb.value)} machine '{name}': it is {state.value}; {verb.value} needs {needed}",
        hint=hint.format(name=name) if hint else None,
        machine=name,
        state=state.value,
    )
