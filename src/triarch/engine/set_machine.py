"""`set`: what is said of a machine changes, and what can holds at once.

The record always says what is wanted. Where a running machine cannot follow, it says what the run has instead
(`running_resources`), and the operation's result names what takes effect at the next start.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from triarch.drivers.base import Resizable
from triarch.engine.cards import LIVE_FIELDS, rewired
from triarch.engine.on_machine import OnMachine
from triarch.engine.policies import check_policies
from triarch.engine.procedure import Step
from triarch.engine.resolve import check_resources
from triarch.engine.services import Services
from triarch.engine.settings import SETTING_FIELDS, changes_between, layers_of, materialize, revised
from triarch.errors import Error, Invalid, NotFound, Unsupported
from triarch.host.grow import grow_at_rest
from triarch.model.machine import Machine, SetMachine, SettingChange
from triarch.model.network import USER_NETWORK
from triarch.model.operation import Progress
from triarch.model.resources import Resources, format_size
from triarch.model.settings import KEYS, RESOURCE_KEYS, Profile, Settings, add_up
from triarch.model.state import State

# The engine alone acts on these.
POLICY_FIELDS = frozenset(
    {
        "labels",
        "description",
        "restart",
        "health",
        "stop_timeout_seconds",
        "autostart",
        "depends_on",
        "protected",
        "snapshots",
    }
)
# Limits that a run has; the disk's size is changed on its own, since it never goes back.
LIMITS = tuple(key for key in RESOURCE_KEYS if key != "disk_bytes")


class SetArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The record before and after. `lenient`: what cannot be changed now is left to the next start, whatever it is."""

    machine: Machine
    after: Machine
    changes: tuple[SettingChange, ...]
    lenient: bool = False


async def plan_set(services: Services, machine: Machine, request: SetMachine) -> SetArguments:
    """What a `set` would do. Raises what is wrong with it; changes nothing."""
    whole = add_up(layers_of(services.profiles, machine))
    after = msgspec.structs.replace(
        machine,
        own=revised(request, machine.own, whole),
        profiles=machine.profiles if request.profiles is None else request.profiles,
    )
    check_profiles(after.profiles)
    return await plan_change(services, machine, after)


async def plan_change(
    services: Services,
    machine: Machine,
    said: Machine,
    instead: Profile | None = None,
    *,
    lenient: bool = False,
    unplugs: str = "",
) -> SetArguments:
    """What follows from `said`, `machine` with other settings or profiles; `instead` is a changed profile.

    `unplugs` is the device that the caller takes out of the running machine.
    """
    old = add_up(layers_of(services.profiles, machine))
    new = add_up(layers_of(services.profiles, said, instead))
    after = materialize(said, new, services.template_of(machine).environment)
    check_resources(machine.name, after.resources)
    _check_disk(machine, after)
    after = await rewired(services, machine, after, new, unplugs)
    services.driver(machine).validate(after)
    check_policies(services, after)
    live = live_fields(services, machine)
    # Where the profile was stored already, only the record knows what was.
    changes = changes_between(old, new, live) or changes_between(*_told_apart(machine, after), live)
    return SetArguments(machine=machine, after=after, changes=changes, lenient=lenient)


def _told_apart(before: Machine, after: Machine) -> tuple[Settings, Settings]:
    """The fields of two records that are not the same, as settings."""
    pairs = {key: (getattr(before.resources, key), getattr(after.resources, key)) for key in RESOURCE_KEYS}
    pairs |= {key: (getattr(before, key), getattr(after, key)) for key in (*SETTING_FIELDS, "environment")}
    apart = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    old, new = ({key: pair[side] for key, pair in apart.items()} for side in (0, 1))
    return Settings(**old), Settings(**new)


def check_profiles(names: tuple[str, ...]) -> None:
    """Raises `Invalid` for one that is there twice: it would count once, and nobody could say where."""
    for name in names:
        if names.count(name) > 1:
            raise Invalid(f"profile '{name}' is named twice", profile=name)


def _check_disk(machine: Machine, after: Machine) -> None:
    had, wanted = machine.resources.disk_bytes, after.resources.disk_bytes
    if wanted < had:
        raise Invalid(
            f"cannot shrink the disk of machine '{machine.name}' from {format_size(had)} to {format_size(wanted)}: "
            "a disk only grows",
            hint=f"triarch set {machine.name} disk={had}",
            machine=machine.name,
        )


def live_fields(services: Services, machine: Machine) -> frozenset[str]:
    """The fields of `Settings` that hold at once. A single limit may still turn out to take a restart."""
    if machine.state not in (State.RUNNING, State.PAUSED):
        return frozenset(KEYS)
    resizable = isinstance(services.driver(machine), Resizable)
    networked = LIVE_FIELDS if machine.network != USER_NETWORK else frozenset()
    return POLICY_FIELDS | networked | (frozenset(RESOURCE_KEYS) if resizable else frozenset())


class SetMachineProcedure(OnMachine[SetArguments]):
    """Live changes one after another, then the record; if one of them fails, those before it are taken back."""

    verb = "set"
    arguments_type = SetArguments

    def __init__(self, services: Services, arguments: SetArguments) -> None:
        super().__init__(services, arguments)
        services.claims.claim(arguments.after)
        self._reached: Resources | None = None
        # What did not become live, and why where that is known.
        self._left: dict[str, str] = {}

    def steps(self) -> tuple[Step, ...]:
        record = Step("record", self._record, commits=True)
        before, after = self.arguments.machine, self.arguments.after
        steps = []
        if before.state in (State.RUNNING, State.PAUSED) and _limits(self._run_has) != _limits(after.resources):
            steps.append(Step("limits", self._resize, self._resize_back))
        if after.resources.disk_bytes > before.resources.disk_bytes:
            steps.append(Step("disk", self._grow))
        return (*steps, record, Step("network", self.machine.replug))

    @property
    def result(self) -> str:
        """`memory: 2G; env.A takes effect at the next start`."""
        parts = []
        for change in self.arguments.changes:
            value = "not set" if change.new is None else change.new
            if change.live and change.key not in self._left:
                parts.append(f"{change.key}: {value}")
            else:
                why = self._left.get(change.key)
                parts.append(f"{change.key}: {value}, takes effect at the next start" + (f" ({why})" if why else ""))
        return "; ".join(parts) or "nothing changed"

    # -- limits

    @property
    def _run_has(self) -> Resources:
        machine = self.arguments.machine
        return machine.running_resources or machine.resources

    async def _resize(self) -> None:
        """All at once; where that takes a restart, each limit that does not."""
        driver, wanted = self.machine.driver, self.arguments.after.resources
        self._reached = self._run_has
        if not isinstance(driver, Resizable):
            self._leave(_differing(self._reached, wanted), f"architecture '{driver.name}' changes no limits live")
            return
        if await self._reach(driver, wanted) is None:
            return
        for key in _differing(self._reached, wanted):
            one = msgspec.structs.replace(self._reached, **{key: getattr(wanted, key)})
            refusal = await self._reach(driver, one)
            if refusal is not None:
                self._leave((key,), refusal.message)

    async def _reach(self, driver: Resizable, resources: Resources) -> Error | None:
        """Make the run have these limits, or say why it takes a restart."""
        try:
            await driver.resize(self.services.spec(msgspec.structs.replace(self.machine.current, resources=resources)))
        except Unsupported as refusal:
            return refusal
        except Error as error:
            if not self.arguments.lenient:
                raise
            return error
        self._reached = resources
        return None

    async def _resize_back(self) -> None:
        driver = self.machine.driver
        if isinstance(driver, Resizable):
            before = msgspec.structs.replace(self.machine.current, resources=self._run_has)
            await driver.resize(self.services.spec(before))

    def _leave(self, fields: tuple[str, ...], why: str) -> None:
        from triarch.model.setting_text import written_of

        self._left.update({written_of(field): why for field in fields})

    # -- the disk

    async def _grow(self) -> None:
        """The file, then the filesystem on it. What has grown stays so, which harms nobody."""
        self.services.report(self.target, Progress(step="disk", text="growing the disk"))
        machine, driver = self.arguments.machine, self.machine.driver
        runs = machine.state in (State.RUNNING, State.PAUSED)
        if runs and not isinstance(driver, Resizable):
            raise Unsupported(
                f"architecture '{driver.name}' cannot grow the disk of machine '{machine.name}' while it runs",
                hint=f"triarch stop {machine.name}",
            )
        path = self.services.pool.delta_path(machine.uuid)
        await asyncio.to_thread(_lengthen, path, self.arguments.after.resources.disk_bytes)
        if runs and isinstance(driver, Resizable):
            try:
                await driver.grow_disk(self.services.spec(self.arguments.after))
            except Unsupported as refusal:
                # The file has grown; the next start lets the filesystem have it.
                self._leave(("disk_bytes",), refusal.message)
        else:
            await asyncio.to_thread(grow_at_rest, path)

    # -- the record

    async def _record(self) -> None:
        after = self.arguments.after
        reached = self._reached
        running = None
        if reached is not None and _limits(reached) != _limits(after.resources):
            running = reached
        await self.machine.update(
            **{field: getattr(after, field) for field in RECORD_FIELDS}, running_resources=running
        )
        self.machine.publish("changed", keys=", ".join(change.key for change in self.arguments.changes)[:500])


def _lengthen(path: Path, size_bytes: int) -> None:
    try:
        if path.stat().st_size < size_bytes:
            os.truncate(path, size_bytes)
    except FileNotFoundError as error:
        raise NotFound(f"the disk is lost: there is no file {path}", path=str(path)) from error


RECORD_FIELDS = ("profiles", "own", "environment", "resources", "network", "nic", "nics", *SETTING_FIELDS)


def _limits(resources: Resources) -> tuple[object, ...]:
    return tuple(getattr(resources, key) for key in LIMITS)


def _differing(one: Resources, other: Resources) -> tuple[str, ...]:
    return tuple(key for key in LIMITS if getattr(one, key) != getattr(other, key))


def drifted(services: Services, machine: Machine) -> bool:
    """Whether the record is not what profiles and its own settings say: the daemon ended amid a profile's change."""
    whole = add_up(layers_of(services.profiles, machine))
    after = materialize(machine, whole, services.template_of(machine).environment)
    return any(
        getattr(after, field) != getattr(machine, field) for field in ("resources", "environment", *SETTING_FIELDS)
    )
