"""Start order, the policy table, and what a health check may be: all pure."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triarch.engine.order import check_dependencies, dependents, start_order
from triarch.engine.probe import check_health
from triarch.engine.supervise import delay_seconds, wants_restart
from triarch.errors import Invalid
from triarch.host.reach import parse_status_line
from triarch.model.machine import Exit, IdRange, Machine
from triarch.model.network import Forward
from triarch.model.policy import HealthCheck, Probe, RestartPolicy
from triarch.model.state import State
from triarch.model.template import Init, TemplateRef

MACHINE = Machine(
    name="web",
    uuid="u",
    index=1,
    template=TemplateRef(name="t", level=1, digest=""),
    architecture="fake",
    init=Init.APP,
    ids=IdRange(base=0),
    created_at=datetime.now(UTC),
)


def machine(**changes: object) -> Machine:
    return msgspec.structs.replace(MACHINE, **changes)


def test_what_a_machine_depends_on_comes_first() -> None:
    depends = {"web": ("db", "cache"), "cache": ("db",), "db": (), "alone": (), "odd": ("nobody",)}
    order = start_order(depends)
    assert sorted(order) == sorted(depends)
    assert order.index("db") < order.index("cache") < order.index("web")
    assert dependents(depends)["db"] == ("web", "cache")


def test_a_cycle_is_named_in_its_direction() -> None:
    others = [machine(name="db", depends_on=("cache",)), machine(name="cache", depends_on=("web",))]
    with pytest.raises(Invalid) as caught:
        check_dependencies(others, machine(depends_on=("db",)))
    shown = caught.value.message.partition(": ")[2]
    # Wherever it is entered, each names the next that it depends on.
    assert shown in {
        "'web' → 'db' → 'cache' → 'web'",
        "'db' → 'cache' → 'web' → 'db'",
        "'cache' → 'web' → 'db' → 'cache'",
    }
    assert caught.value.hint is not None and caught.value.hint.endswith("depends-on=")
    with pytest.raises(Invalid, match="'web' → 'web'"):
        check_dependencies([], machine(depends_on=("web",)))
    check_dependencies(others, machine(depends_on=("another",)))


@pytest.mark.parametrize(
    ("policy", "state", "ended", "again"),
    [
        (RestartPolicy.NO, State.FAILED, Exit(code=1), False),
        (RestartPolicy.NO, State.STOPPED, Exit(code=0, reason="rebooted"), True),
        (RestartPolicy.ON_FAILURE, State.STOPPED, Exit(code=0), False),
        (RestartPolicy.ON_FAILURE, State.STOPPED, Exit(code=3), True),
        (RestartPolicy.ON_FAILURE, State.FAILED, Exit(code=0), True),
        (RestartPolicy.ON_FAILURE, State.STOPPED, Exit(code=None, reason="nobody watched"), True),
        (RestartPolicy.ALWAYS, State.STOPPED, Exit(code=0), True),
    ],
)
def test_the_policies(policy: RestartPolicy, state: State, ended: Exit, again: bool) -> None:
    assert wants_restart(machine(restart=policy, state=state, last_exit=ended)) is again


def test_the_delay_grows_from_one_second_to_a_minute() -> None:
    assert [delay_seconds(count) for count in (1, 2, 3, 6, 7, 8, 1000)] == [1, 2, 4, 32, 60, 60, 60]


def test_checks_that_cannot_work_are_refused_before_anything_is_changed() -> None:
    http = HealthCheck(probe=Probe.HTTP, port=80)
    faults = {
        "no command": machine(health=HealthCheck()),
        "NUL": machine(health=HealthCheck(command=("a\0b",))),
        "needs a port": machine(health=HealthCheck(probe=Probe.TCP)),
        "has no network": machine(health=http, network="none"),
        "only through a forward": machine(health=http, network="user"),
        "illegal path": machine(health=msgspec.structs.replace(http, path="/a b\r\nEvil: 1")),
    }
    for text, bad in faults.items():
        with pytest.raises(Invalid, match=text):
            check_health(bad)
    check_health(machine(health=http, network="user", forwards=(Forward(host_port=8080, machine_port=80),)))
    check_health(machine(health=http))
    check_health(machine())


@given(st.binary(max_size=64))
def test_no_status_line_of_a_guest_is_believed_by_mistake(line: bytes) -> None:
    try:
        status = parse_status_line(line)
    except ValueError:
        return
    assert line.startswith(b"HTTP/1.") and 100 <= status <= 599


@pytest.mark.parametrize(
    ("line", "status"),
    [(b"HTTP/1.1 200 OK\r\n", 200), (b"HTTP/1.0 404\n", 404), (b"HTTP/1.1 302 Found\r\n", 302)],
)
def test_status_lines(line: bytes, status: int) -> None:
    assert parse_status_line(line) == status
