"""The order that dependencies between machines ask for: what a machine depends on runs before it does.

A dependency may name a machine that does not exist yet, so that machines can be made in any order; its start says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from triarch.errors import Invalid
from triarch.model.machine import Machine

Dependencies = Mapping[str, Sequence[str]]


def dependencies(machines: Iterable[Machine]) -> dict[str, tuple[str, ...]]:
    return {machine.name: machine.depends_on for machine in machines}


def start_order(depends: Dependencies) -> tuple[str, ...]:
    """All machines, each after those that it depends on. Raises `Invalid` that names a cycle."""
    known = {name: [other for other in others if other in depends] for name, others in depends.items()}
    try:
        return tuple(TopologicalSorter(known).static_order())
    except CycleError as error:
        # graphlib lists a cycle against the direction of the dependencies, its first element repeated at the end.
        cycle = tuple(reversed(error.args[1]))
        shown = " → ".join(f"'{name}'" for name in cycle)
        raise Invalid(
            f"machine '{cycle[0]}' would depend on itself: {shown}",
            hint=f"triarch set {cycle[0]} depends-on=",
            machine=cycle[0],
        ) from error


def best_order(depends: Dependencies) -> tuple[str, ...]:
    """As `start_order`, or by name where dependencies go round all the same."""
    try:
        return start_order(depends)
    except Invalid:
        return tuple(sorted(depends))


def check_dependencies(machines: Iterable[Machine], changed: Machine) -> None:
    """Refuse dependencies of `changed`, a new or changed machine, that go round. Raises `Invalid` that names them."""
    if changed.depends_on:
        start_order({**dependencies(machines), changed.name: changed.depends_on})


def dependents(depends: Dependencies) -> dict[str, tuple[str, ...]]:
    """For each machine those that depend on it, which are stopped before it is."""
    return {name: tuple(other for other, needs in depends.items() if name in needs) for name in depends}
