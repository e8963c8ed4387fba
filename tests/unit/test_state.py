"""One walk over every pair of state and verb."""

from __future__ import annotations

import itertools

import pytest

from triarch.errors import WrongState
from triarch.model.state import TRANSITIONS, State, Verb, next_state

PAIRS = list(itertools.product(State, Verb))

# Written down again, by hand: what comes of each verb. `-` is refused, `gone` means that the machine is no more.
TABLE = """
           start    stop     restart  kill     pause    resume   delete   rename   switch   exec     console
stopped    running  -        -        -        -        -        gone     stopped  stopped  -        -
running    -        stopped  running  stopped  paused   -        -        -        running  running  running
paused     -        -        -        stopped  -        running  -        -        -        -        -
failed     running  -        -        -        -        -        gone     failed   stopped  -        -
"""


def expected() -> dict[tuple[State, Verb], str]:
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    return {(State(row[0]), Verb(verb)): cell for row in rows for verb, cell in zip(header, row[1:], strict=True)}


def test_the_table_has_every_pair() -> None:
    assert set(expected()) == set(PAIRS)


@pytest.mark.parametrize(("state", "verb"), PAIRS, ids=str)
def test_every_pair(state: State, verb: Verb) -> None:
    cell = expected()[state, verb]
    if cell != "-":
        after = next_state("web", state, verb)
        assert (after.value if after else "gone") == cell
        return
    with pytest.raises(WrongState) as refusal:
        next_state("web", state, verb)
    message, hint = refusal.value.message, refusal.value.hint
    deed = {Verb.EXEC: "run a command in", Verb.CONSOLE: "attach to the console of"}.get(verb, verb.value)
    assert message.startswith(f"cannot {deed} machine 'web': it is {state}; {verb} needs ")
    able = {source.value for (source, other), cell in expected().items() if other is verb and cell != "-"}
    assert set(message.rpartition(" needs ")[2].split(" or ")) == able
    assert refusal.value.fields == {"machine": "web", "state": state.value}
    assert hint is None or hint in {f"triarch {word} web" for word in ("start", "stop", "kill", "resume", "logs")}


@pytest.mark.parametrize(("state", "verb"), PAIRS, ids=str)
def test_a_hint_is_a_command_that_works(state: State, verb: Verb) -> None:
    """Whoever follows it is allowed to."""
    if (state, verb) in TRANSITIONS:
        return
    with pytest.raises(WrongState) as refusal:
        next_state("web", state, verb)
    if refusal.value.hint is None:
        return
    word = refusal.value.hint.split()[1]
    assert word == "logs" or (state, Verb(word)) in TRANSITIONS


def test_no_state_is_a_trap() -> None:
    """From every state a machine can be deleted in the end."""
    reached: set[State | None] = {None}
    while True:
        more = {state for (state, _), after in TRANSITIONS.items() if after in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == {None, *State}
