"""What changed between two moments of a machine: files, and the packages that they belong to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from uuid import uuid4

import msgspec

from triarch.engine.capture import capture, let_go, to_the_end
from triarch.engine.machine_actions import MachineActions
from triarch.engine.packages import Package, owners_of, packages_of
from triarch.engine.services import Services
from triarch.engine.trees import Tree
from triarch.model.difference import Change, Difference, FileChange, PackageChange
from triarch.model.driver import LayerFile
from triarch.model.file_protocol import FileEntry, FileKind
from triarch.model.machine import Machine
from triarch.model.snapshot import DELTA, Snapshot

# Directories that change with what is in them say nothing by their time.
_TIMELESS = (FileKind.DIRECTORY,)


class _Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two: its objects by path, and its packages by name."""

    entries: dict[bytes, FileEntry]
    packages: dict[str, Package]


async def difference(services: Services, machine: Machine, old: Snapshot, new: Snapshot | None) -> Difference:
    """From `old` to `new`, or to what the machine is now. Raises what a capture and a visit raise."""
    async with _opened(services, machine, old) as tree:
        before = await _read(services, tree)
    async with _opened(services, machine, new) as tree:
        after = await _read(services, tree)
    packages = tuple(_compare_packages(before.packages, after.packages))
    owners = owners_of((*before.packages.values(), *after.packages.values()))
    return Difference(
        old=old.name,
        new="" if new is None else new.name,
        files=tuple(_compare(before.entries, after.entries, owners)),
        packages=packages,
    )


@asynccontextmanager
async def _opened(services: Services, machine: Machine, snapshot: Snapshot | None) -> AsyncIterator[Tree]:
    """A clone that nobody else reads: a snapshot may be restored, and a machine may write, meanwhile."""
    sets, set_id = services.pool.sets, str(uuid4())
    actions = MachineActions(services, machine)
    try:
        if snapshot is None:
            await capture(actions, set_id)
        else:
            await to_the_end(lambda: sets.duplicate(snapshot.id, set_id))
        await asyncio.to_thread(sets.check, set_id)
        past = machine if snapshot is None else snapshot.machine
        layers = []
        for layer in services.template_of(past).layers:
            path = await asyncio.to_thread(services.pool.verify_layer, layer)
            layers.append(LayerFile(digest=layer.digest, path=str(path), size_bytes=layer.size_bytes))
        yield Tree(
            layers=tuple(layers),
            delta_path=str(sets.disk_path(set_id, DELTA)),
            ids=machine.ids,
        )
    finally:
        if snapshot is None:
            await asyncio.shield(let_go(actions, set_id))
        else:
            await asyncio.shield(asyncio.to_thread(sets.remove, set_id))


async def _read(services: Services, tree: Tree) -> _Side:
    entries = {item.entry.path: item.entry async for item in services.trees.walk(tree)}
    return _Side(entries=entries, packages=await packages_of(services.trees, tree, entries))


def _compare(
    before: dict[bytes, FileEntry], after: dict[bytes, FileEntry], owners: dict[bytes, str]
) -> Iterable[FileChange]:
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old is None:
            change = Change.ADDED
        elif new is None:
            change = Change.REMOVED
        elif _facts(old) != _facts(new):
            change = Change.CHANGED
        else:
            continue
        yield FileChange(
            # JSON holds text only: what is none is shown as near as can be.
            path="/" + path.decode(errors="backslashreplace"),
            change=change,
            kind=(new or before[path]).kind.value,
            package=owners.get(path, ""),
            old_bytes=None if old is None or old.kind is not FileKind.FILE else old.size_bytes,
            new_bytes=None if new is None or new.kind is not FileKind.FILE else new.size_bytes,
        )


def _facts(entry: FileEntry) -> tuple[object, ...]:
    time = 0 if entry.kind in _TIMELESS else entry.modified_ns
    size = 0 if entry.kind in _TIMELESS else entry.size_bytes
    return (entry.kind, entry.mode, entry.uid, entry.gid, size, time, entry.target, entry.xattrs)


def _compare_packages(before: dict[str, Package], after: dict[str, Package]) -> Iterable[PackageChange]:
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        versions = (old.version if old else None, new.version if new else None)
        if versions[0] != versions[1]:
            yield PackageChange(name=name, old_version=versions[0], new_version=versions[1])
