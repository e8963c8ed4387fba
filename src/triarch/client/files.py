"""The files of machines: `client.files.push(…)` and its relatives. Paths are bytes, because names need not be text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from triarch.client.file_faults import error_of_fault
from triarch.client.file_link import FileLink, StreamCarrier, open_direct
from triarch.client.file_local import Report, Transfer
from triarch.client.file_pull import Pull
from triarch.client.file_push import Full, Overrides, Push, Skipped
from triarch.errors import Damaged, Error
from triarch.model.file_protocol import (
    FileEntry,
    FileFault,
    FileKind,
    Flag,
    Frame,
    decode_entry,
    decode_fault,
    list_request,
    remove_request,
    stat_request,
)
from triarch.model.stream import FilesRequest

if TYPE_CHECKING:
    from triarch.client.api import Client

_MAX_LISTED = 1_000_000


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a copy did. `errors` are objects that should be there and are not, `skipped` those that cannot be.

    `disarmed` counts set-user-ID bits and file capabilities that were left out.
    """

    transfer: Transfer
    errors: tuple[Error, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    disarmed: int = 0


def _quiet(_: Transfer) -> None:
    """Nobody wants to know."""


class Files:
    """Bound to a client. Every call is one visit: a stopped machine is held while it lasts."""

    def __init__(self, client: Client, *, direct: bool = True) -> None:
        """Without `direct` all goes through the daemon, as for a client on another host."""
        self._client = client
        self._direct = direct

    @contextmanager
    def visit(self, name: str) -> Iterator[FileLink]:
        """A conversation with the file server in a machine; ends in good order, or at once when it fails."""
        stream = self._client.open_files(name, FilesRequest(direct=self._direct))
        try:
            if self._direct:
                carrier, connection = open_direct(stream)
                link = FileLink(stream, carrier, connection)
            else:
                link = FileLink(stream, StreamCarrier(stream))
        except BaseException:
            stream.close()
            raise
        with link:
            try:
                yield link
            except BaseException:
                link.abandon()
                raise
            link.finish()

    def stat(self, name: str, path: bytes, *, follow: bool = True) -> FileEntry | None:
        """What is at `path`; None when nothing is."""
        with self.visit(name) as link:
            return _stat(link, path, follow=follow)

    def list(self, name: str, path: bytes) -> tuple[FileEntry, ...]:
        """What is in a directory, sorted by name; something else is its own only entry. Raises `NotFound`, ….."""
        with self.visit(name) as link:
            link.send(list_request(path))
            entries, faults = _answers(link)
            if faults and (here := _stat(link, path, follow=True)) is not None and here.kind is not FileKind.DIRECTORY:
                return (msgspec.structs.replace(here, path=os.path.basename(path)),)  # noqa: PTH119
        if faults:
            raise error_of_fault(name, "list", faults[0])
        return tuple(sorted(entries, key=lambda entry: entry.path))

    def delete(self, name: str, path: bytes, *, recursive: bool = False) -> None:
        """Remove what is at `path`. Raises `NotFound`, `InUse` for a directory that is not empty, …"""
        with self.visit(name) as link:
            link.send(remove_request(path, Flag.RECURSIVE if recursive else Flag.NONE))
            _, faults = _answers(link)
        if faults:
            raise error_of_fault(name, "delete", faults[0])

    def push(
        self,
        name: str,
        sources: Sequence[bytes],
        target: bytes,
        *,
        recursive: bool = False,
        parents: bool = False,
        overrides: Overrides | None = None,
        report: Report = _quiet,
    ) -> Outcome:
        """Copy local trees to `target`, or into it where that is a directory or ends with a slash."""
        with self.visit(name) as link:
            push = Push(link, overrides or Overrides(), report)
            below = target.endswith(b"/") or len(sources) > 1
            place = target.rstrip(b"/") or b"/"
            if parents:
                _make_parents(link, name, place if below else os.path.dirname(place))  # noqa: PTH120
            if not below:
                found = _stat(link, place, follow=True)
                below = found is not None and found.kind is FileKind.DIRECTORY
            try:
                for source in sources:
                    base = os.path.basename(source.rstrip(b"/")) or b"root"  # noqa: PTH119
                    push.tree(source, place.rstrip(b"/") + b"/" + base if below else place, recursive=recursive)
            except Full:
                pass
            push.sync()
        return _pushed(name, push)

    def push_stream(
        self, name: str, source: BinaryIO, target: bytes, overrides: Overrides | None = None, report: Report = _quiet
    ) -> Outcome:
        """Copy what can be read from `source` to the file `target`."""
        with self.visit(name) as link:
            push = Push(link, overrides or Overrides(), report)
            with suppress(Full):
                push.stream(source, target)
            push.sync()
        return _pushed(name, push)

    def pull(
        self,
        name: str,
        sources: Sequence[bytes],
        target: bytes,
        *,
        recursive: bool = False,
        trusted: bool = False,
        report: Report = _quiet,
    ) -> Outcome:
        """Copy trees of a machine to the local `target`, or into it where that is a directory or ends with a slash.

        Nothing is written outside of it. `trusted` keeps set-user-ID bits and file capabilities.
        """
        with self.visit(name) as link:
            pull = Pull(link, name, report, trusted=trusted)
            below = target.endswith(b"/") or len(sources) > 1 or os.path.isdir(target)  # noqa: PTH112
            for source in sources:
                base = os.path.basename(source.rstrip(b"/")) or os.fsencode(name)  # noqa: PTH119
                directory, last = (target, base) if below else os.path.split(target)
                pull.tree(source, directory or b".", last, recursive=recursive)
        errors = tuple(error_of_fault(name, "pull", fault) for fault in pull.faults)
        return Outcome(transfer=pull.transfer, errors=errors, skipped=tuple(pull.skipped), disarmed=pull.disarmed)

    def pull_stream(self, name: str, source: bytes, target: BinaryIO, report: Report = _quiet) -> Outcome:
        """Copy a file's content to `target`."""
        with self.visit(name) as link:
            pull = Pull(link, name, report, trusted=False)
            pull.stream(source, target)
        return Outcome(transfer=pull.transfer)


def _pushed(name: str, push: Push) -> Outcome:
    errors = tuple(error_of_fault(name, "push", fault, push.largest_bytes) for fault in push.faults)
    return Outcome(transfer=push.transfer, errors=errors, skipped=tuple(push.skipped))


def _stat(link: FileLink, path: bytes, *, follow: bool) -> FileEntry | None:
    link.send(stat_request(path, Flag.FOLLOW if follow else Flag.NONE))
    kind, payload = link.next()
    if kind is Frame.ERROR:
        return None
    if kind is not Frame.ENTRY:
        raise Damaged(f"the file server answered a question about a file with {kind.name}")
    return decode_entry(payload)


def _answers(link: FileLink) -> tuple[list[FileEntry], list[FileFault]]:
    entries: list[FileEntry] = []
    faults: list[FileFault] = []
    while True:
        kind, payload = link.next()
        if kind is Frame.DONE:
            return entries, faults
        if kind is Frame.ENTRY:
            entries.append(decode_entry(payload))
        elif kind is Frame.ERROR:
            faults.append(decode_fault(payload))
        else:
            raise Damaged(f"the file server answered with {kind.name}")
        if len(entries) + len(faults) > _MAX_LISTED:
            raise Damaged(f"the file server told of more than {_MAX_LISTED} objects")


def _make_parents(link: FileLink, name: str, directory: bytes) -> None:
    path = b""
    for part in directory.split(b"/"):
        if part:
            path += b"/" + part
            link.begin(FileEntry(path=path, kind=FileKind.DIRECTORY, mode=0o755, modified_ns=_now_ns()))
    for fault in link.sync():
        raise error_of_fault(name, "push", fault)


def _now_ns() -> int:
    import time

    return time.time_ns()
