"""Profiles: settings under a name. A changed one is applied to every machine that has it, live where it can be."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import ClassVar

import msgspec

from triarch.engine.operations import Operations
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.engine.set_machine import SetMachineProcedure, drifted, plan_change
from triarch.engine.settings import revised
from triarch.errors import Busy, Error, Exists, InUse, Invalid
from triarch.model.machine import Machine
from triarch.model.names import MACHINE_NAME_RULE, check_machine_name, some_of
from triarch.model.operation import Operation, Progress
from triarch.model.settings import MACHINE_LAYER, Profile, ProfileView, SetProfile

log = logging.getLogger(__name__)


class ProfileArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The profile before and after; None where there is none."""

    name: str
    before: Profile | None = None
    after: Profile | None = None


class ProfileProcedure:
    """One write, then its machines one after another, each an operation of its own.

    After a crash the write stands and `reconcile` sees to the machines.
    """

    verb: ClassVar[str]
    arguments_type: ClassVar[type[msgspec.Struct]] = ProfileArguments

    def __init__(self, services: Services, arguments: ProfileArguments, operations: Operations | None = None) -> None:
        self.arguments = arguments
        self._services = services
        self._operations = operations
        self._told: list[str] = []

    @property
    def target(self) -> str:
        return f"profile/{self.arguments.name}"

    @property
    def result(self) -> str:
        return "\n".join(self._told) or self.arguments.name

    def steps(self) -> tuple[Step, ...]:
        return (Step("store", self._store, self._restore, commits=True), Step("machines", self._apply))

    async def _store(self) -> None:
        await self._write(self.arguments.after)
        self._services.events.publish(f"profile-{self.verb.partition('-')[0]}", self.target, {})

    async def _restore(self) -> None:
        await self._write(self.arguments.before)

    async def _write(self, profile: Profile | None) -> None:
        if profile is None:
            await self._services.profiles.remove(self.arguments.name)
        else:
            await self._services.profiles.put(profile)

    async def _apply(self) -> None:
        if self._operations is None:
            return
        users = users_of(self._services, self.arguments.name)
        for count, name in enumerate(users):
            progress = Progress(step="machines", text=f"machine {name}", fraction=count / len(users))
            self._services.report(self.target, progress)
            told = await apply_to(self._services, self._operations, name)
            if told is not None:
                self._told.append(f"{name}: {told}")


class CreateProfile(ProfileProcedure):
    verb = "create-profile"


class ChangeProfile(ProfileProcedure):
    verb = "set-profile"


class DeleteProfile(ProfileProcedure):
    verb = "delete-profile"


PROFILE_PROCEDURES: tuple[type[ProfileProcedure], ...] = (CreateProfile, ChangeProfile, DeleteProfile)


def users_of(services: Services, profile: str) -> tuple[str, ...]:
    """The names of the machines that have the profile."""
    return tuple(kept.value.name for kept in services.machines.all() if profile in kept.value.profiles)


async def apply_to(services: Services, operations: Operations, name: str) -> str | None:
    """Make a machine's record follow its profiles once nothing else holds it; what came of it, None for no change."""
    while (holder := operations.holder(f"machine/{name}")) is not None:
        await operations.wait(holder)
    kept = services.machines.find(name)
    if kept is None or not drifted(services, kept.value):
        return None
    try:
        arguments = await plan_change(services, kept.value, kept.value, lenient=True)
        operation = operations.begin(SetMachineProcedure(services, arguments))
    except Busy:
        return await apply_to(services, operations, name)
    except Error as error:
        return f"failed: {error.message}"
    ended = await operations.wait(operation.id)
    return ended.result if ended.error is None else f"failed: {ended.error.message}"


class Profiles:
    """The noun `profile`. Changes return an `Operation`; what any machine would refuse refuses the whole change."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations
        self._reconciling: asyncio.Task[None] | None = None
        self._again = False

    def all(self) -> tuple[ProfileView, ...]:
        """Sorted by name."""
        users: dict[str, list[str]] = {}
        for kept in self._services.machines.all():
            for name in kept.value.profiles:
                users.setdefault(name, []).append(kept.value.name)
        return tuple(_view(profile, users.get(profile.name, ())) for profile in self._services.profiles.all())

    def get(self, name: str) -> ProfileView:
        """Raises `NotFound`."""
        return _view(self._services.profiles.get(name), users_of(self._services, name))

    async def create(self, profile: Profile) -> Operation:
        """Raises `Invalid` and `Exists`."""
        check_profile_name(profile.name)
        if any(other.name == profile.name for other in self._services.profiles.all()):
            raise Exists(
                f"profile '{profile.name}' exists already",
                hint=f"triarch profile show {profile.name}",
                profile=profile.name,
            )
        return self._operations.begin(
            CreateProfile(self._services, ProfileArguments(name=profile.name, after=profile), self._operations)
        )

    async def replace(self, name: str, profile: Profile) -> Operation:
        """All of it anew. Raises what a machine that has it would refuse."""
        before = self._services.profiles.get(name)
        if profile.name != name:
            raise Invalid(f"profile '{name}' cannot be renamed to '{profile.name[:80]}'", profile=name)
        self._operations.check_free(f"profile/{name}")
        await self._check_users(profile)
        arguments = ProfileArguments(name=name, before=before, after=profile)
        return self._operations.begin(ChangeProfile(self._services, arguments, self._operations))

    async def set(self, name: str, request: SetProfile) -> Operation:
        """Some of its settings. Raises as `replace` does."""
        before = self._services.profiles.get(name)
        after = msgspec.structs.replace(
            before,
            settings=revised(request, before.settings, before.settings),
            description=before.description if request.description is None else request.description,
        )
        return await self.replace(name, after)

    async def _check_users(self, profile: Profile) -> None:
        for name in users_of(self._services, profile.name):
            machine = self._services.machines.get(name)
            try:
                await plan_change(self._services, machine, machine, profile)
            except Error as error:
                raise type(error)(
                    f"cannot change profile '{profile.name}': {error.message}", hint=error.hint, **error.fields
                ) from error

    async def delete(self, name: str) -> Operation:
        """Raises `InUse` that names machines which have it."""
        before = self._services.profiles.get(name)
        # Those that are being made, too.
        machines = self._services.claims.others("")
        users = sorted({machine.name for machine in machines if name in machine.profiles})
        if users:
            raise InUse(
                f"profile '{name}' is in use by {some_of(users)}",
                hint=f"triarch set {users[0]} profiles={','.join(_without(self._services, users[0], name))}",
                profile=name,
            )
        arguments = ProfileArguments(name=name, before=before)
        return self._operations.begin(DeleteProfile(self._services, arguments, self._operations))

    # -- after a crash

    def reconcile(self) -> None:
        """See to machines whose profile changed while the last daemon ended."""
        if self._reconciling is not None and not self._reconciling.done():
            self._again = True
            return
        self._again = False
        behind = [kept.value.name for kept in self._services.machines.all() if self._is_behind(kept.value)]
        if behind:
            self._reconciling = asyncio.create_task(self._catch_up(behind), name="profiles")

    def _is_behind(self, machine: Machine) -> bool:
        try:
            return drifted(self._services, machine)
        except Error:
            log.exception("cannot tell what the profiles of machine '%s' say", machine.name)
            return False

    async def _catch_up(self, names: list[str]) -> None:
        for name in names:
            told = await apply_to(self._services, self._operations, name)
            log.info("machine '%s' follows its profiles: %s", name, told)
        self._reconciling = None
        if self._again:
            self.reconcile()

    async def close(self) -> None:
        if self._reconciling is not None:
            self._reconciling.cancel()
            await asyncio.gather(self._reconciling, return_exceptions=True)


def _without(services: Services, machine: str, profile: str) -> tuple[str, ...]:
    kept = services.machines.find(machine)
    return tuple(name for name in kept.value.profiles if name != profile) if kept is not None else ()


def _view(profile: Profile, used_by: tuple[str, ...] | list[str]) -> ProfileView:
    etag = hashlib.sha256(msgspec.json.encode(profile, order="deterministic")).hexdigest()[:16]
    return ProfileView(**msgspec.structs.asdict(profile), used_by=tuple(used_by), etag=etag)


def check_profile_name(name: str) -> str:
    """Return `name`, or raise `Invalid` that states the rule."""
    if name == MACHINE_LAYER:
        raise Invalid(f"illegal profile name '{name}': it stands for a machine's own settings", name=name)
    try:
        return check_machine_name(name)
    except Invalid as error:
        raise Invalid(f"illegal profile name {name[:80]!r}: it needs {MACHINE_NAME_RULE}", name=name[:80]) from error
