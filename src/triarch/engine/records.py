"""Machines and templates as stored, with the copy in memory that lists are served from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Generic, TypeVar, cast

import msgspec

from triarch.errors import Damaged, Exists, NotFound, Stale
from triarch.model.machine import Machine
from triarch.model.nearest import did_you_mean, nearest
from triarch.model.network import Network
from triarch.model.settings import Profile, Settings
from triarch.model.template import Template, parse_template_name
from triarch.store.base import Compare, Delete, Entry, Put, Store

T = TypeVar("T", bound=msgspec.Struct)
N = TypeVar("N", Profile, Network)


def decode_entry(entry: Entry, kind: type[T]) -> T:
    """The record in `entry`. Raises `Damaged` for what is no such record, or not one of this version's."""
    try:
        return msgspec.json.decode(entry.value, type=kind)
    except msgspec.MsgspecError as error:
        what = str(error)
        raise Damaged(
            f"the record '{entry.key}' in the store cannot be read: {what[:1].lower()}{what[1:]}",
            hint="use the Triarch that wrote it",
            key=entry.key,
        ) from error


class Kept(msgspec.Struct, Generic[T], frozen=True):
    """A record and the revision of the store at which it was written."""

    value: T
    revision: int


class MachineRecords:
    """Machines by name. One key `machines/UUID` each; names are unique because this daemon alone writes them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_name: dict[str, Kept[Machine]] = {}
        self._names: dict[str, str] = {}
        # Called with the uuid and the record after each write; None when it is gone.
        self.heed: Callable[[str, Machine | None], None] = lambda uuid, machine: None

    async def load(self) -> None:
        for entry in await self._store.list("machines/"):
            self._keep(decode_entry(entry, Machine), entry.revision)

    def _keep(self, machine: Machine, revision: int) -> None:
        former = self._names.get(machine.uuid)
        if former is not None and former != machine.name:
            del self._by_name[former]
        self._names[machine.uuid] = machine.name
        self._by_name[machine.name] = Kept(machine, revision)

    def all(self) -> tuple[Kept[Machine], ...]:
        return tuple(self._by_name[name] for name in sorted(self._by_name))

    def find(self, name: str) -> Kept[Machine] | None:
        return self._by_name.get(name)

    def find_uuid(self, uuid: str) -> Machine | None:
        name = self._names.get(uuid)
        return self._by_name[name].value if name is not None else None

    def get(self, name: str) -> Machine:
        return self.kept(name).value

    def kept(self, name: str) -> Kept[Machine]:
        """Raises `NotFound` with the nearest name there is."""
        kept = self._by_name.get(name)
        if kept is None:
            meant = did_you_mean(nearest(name, self._by_name))
            raise NotFound(f"there is no machine '{name}'{meant}", hint="triarch list", machine=name)
        return kept

    async def add(self, machine: Machine) -> None:
        """Store a new machine; the same one again is success. Raises `Exists`."""
        kept = self._by_name.get(machine.name)
        if kept is not None and kept.value.uuid != machine.uuid:
            raise Exists(f"machine '{machine.name}' exists already", hint=f"triarch info {machine.name}")
        await self.put(machine)

    async def put(self, machine: Machine) -> None:
        """Write a machine as it is now, under its present name."""
        revision = await self._store.put(f"machines/{machine.uuid}", msgspec.json.encode(machine))
        self._keep(machine, revision)
        self.heed(machine.uuid, machine)

    async def remove(self, machine: Machine) -> None:
        """Absent is success."""
        await self._store.delete(f"machines/{machine.uuid}")
        name = self._names.pop(machine.uuid, None)
        if name is not None:
            del self._by_name[name]
        self.heed(machine.uuid, None)


class TemplateRecords:
    """Templates by name and level. One key `templates/NAME/LEVEL` each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_ref: dict[str, Template] = {}
        # Digests of layers that are in the pool before their template is recorded.
        self.coming: set[str] = set()

    async def load(self) -> None:
        for entry in await self._store.list("templates/"):
            template = decode_entry(entry, Template)
            self._by_ref[template.ref] = template

    def all(self) -> tuple[Template, ...]:
        return tuple(sorted(self._by_ref.values(), key=lambda t: (t.name, t.level)))

    def levels(self, name: str) -> tuple[Template, ...]:
        """All levels of a template, lowest first; empty when there is none."""
        return tuple(template for template in self.all() if template.name == name)

    def get(self, text: str) -> Template:
        """The template `NAME@LEVEL`, or the newest level of `NAME`. Raises `Invalid` or `NotFound`."""
        name, level = parse_template_name(text)
        levels = self.levels(name)
        if not levels:
            raise self._missing(name)
        if level is None:
            return levels[-1]
        for template in levels:
            if template.level == level:
                return template
        raise NotFound(f"template '{name}' has no level {level}: its newest is {levels[-1].level}", template=text)

    def _missing(self, name: str) -> NotFound:
        near = nearest(name, {t.name for t in self._by_ref.values()})
        return NotFound(
            f"there is no template '{name}'{did_you_mean(near)}",
            hint="triarch template list" if near else f"triarch template build {name}",
            template=name,
        )

    async def add(self, template: Template) -> None:
        """Store a new level. Raises `Exists` when another template has that name and level."""
        key = f"templates/{template.name}/{template.level}"
        if self._by_ref.get(template.ref) == template:
            return
        try:
            await self._store.txn([Compare(key=key, revision=0)], [Put(key=key, value=msgspec.json.encode(template))])
        except Stale as error:
            raise Exists(f"template '{template.ref}' exists already") from error
        self._by_ref[template.ref] = template

    @contextmanager
    def promised(self, template: Template) -> Iterator[None]:
        """Known while the block lasts, and not stored: what is chosen for a machine may stand on it already."""
        self._by_ref[template.ref] = template
        try:
            yield
        finally:
            self._by_ref.pop(template.ref, None)

    async def remove(self, templates: tuple[Template, ...]) -> None:
        """All of them in one transaction; absent is success."""
        writes = [Delete(key=f"templates/{template.name}/{template.level}") for template in templates]
        await self._store.txn([], writes)
        for template in templates:
            self._by_ref.pop(template.ref, None)


class NamedRecords(Generic[N]):
    """Records by name. One key `NOUNs/NAME` each."""

    noun: ClassVar[str]
    kind: ClassVar[type[Profile] | type[Network]]

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_name: dict[str, N] = {}

    async def load(self) -> None:
        for entry in await self._store.list(self._key("")):
            record = cast(N, decode_entry(entry, self.kind))
            self._by_name[record.name] = record

    def all(self) -> tuple[N, ...]:
        return tuple(self._by_name[name] for name in sorted(self._by_name))

    def find(self, name: str) -> N | None:
        return self._by_name.get(name)

    def get(self, name: str) -> N:
        """Raises `NotFound` with the nearest name there is."""
        record = self._by_name.get(name)
        if record is None:
            meant = did_you_mean(nearest(name, self._by_name))
            hint = f"triarch {self.noun} list"
            raise NotFound(f"there is no {self.noun} '{name}'{meant}", hint=hint, **{self.noun: name})
        return record

    async def put(self, record: N) -> None:
        await self._store.put(self._key(record.name), msgspec.json.encode(record))
        self._by_name[record.name] = record

    async def remove(self, name: str) -> None:
        """Absent is success."""
        await self._store.delete(self._key(name))
        self._by_name.pop(name, None)

    def _key(self, name: str) -> str:
        return f"{self.noun}s/{name}"


class ProfileRecords(NamedRecords[Profile]):
    """Profiles, and what they add up to."""

    noun = "profile"
    kind = Profile

    def layers(self, names: Iterable[str]) -> tuple[Settings, ...]:
        """The settings of the named profiles, in order. Raises `NotFound`."""
        return tuple(self.get(name).settings for name in names)
