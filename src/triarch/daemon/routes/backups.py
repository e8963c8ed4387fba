"""Copies and backups of machines: copy, export, import, and the spool that backups go through, both ways resumable."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post, put
from litestar.exceptions import InternalServerException
from litestar.openapi.spec import OpenAPIMediaType, RequestBody, Schema
from litestar.openapi.spec import Operation as OpenAPIOperation
from litestar.params import Parameter
from litestar.response import Stream

from triarch.daemon.problems import problems
from triarch.daemon.routes.machines import Name
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.errors import Invalid
from triarch.model.operation import Operation
from triarch.model.snapshot import BACKUP_ID_PATTERN, Backup, CopyMachine, ExportMachine, ImportMachine, UploadBackup

TAGS = ["backups"]
CHANGE_PROBLEMS = (404, 409, 413, 422, 503, 507)
PIECE_BYTES = 1 << 20
_RANGE = re.compile(r"bytes=(\d{1,19})-\Z")
Id = Annotated[str, Parameter(description="The backup's id", schema_extra={"pattern": BACKUP_ID_PATTERN})]
Offset = Annotated[int, Parameter(query="offset", ge=0, description="How many bytes came before")]
Range = Annotated[
    str | None, Parameter(header="Range", required=False, description="`bytes=N-`: what comes after the first N bytes")
]


@change(post, "/machines/{name:str}/copy", "copy_machine", TAGS, *CHANGE_PROBLEMS)
async def copy_machine(engine: Engine, name: Name, data: CopyMachine) -> Response[Operation]:
    """Make a new machine like this one, or like its snapshot, with an identity of its own."""
    return accepted(await engine.backups.copy(name, data))


@change(post, "/machines/{name:str}/export", "export_machine", TAGS, *CHANGE_PROBLEMS)
async def export_machine(engine: Engine, name: Name, data: ExportMachine) -> Response[Operation]:
    """Write a backup of a machine; the operation's result is its id."""
    return accepted(await engine.backups.export(name, data))


@get("/backups", operation_id="list_backups", tags=TAGS, responses=problems(), sync_to_thread=False)
def list_backups(engine: Engine) -> tuple[Backup, ...]:
    """What is in the spool."""
    return engine.backups.spool.all()


@post(
    "/backups",
    operation_id="upload_backup",
    tags=TAGS,
    status_code=200,
    responses=problems(409, 413, 507),
    sync_to_thread=False,
)
def upload_backup(engine: Engine, data: UploadBackup) -> Backup:
    """Begin an upload, or find out how far it came: the content goes on at `received_bytes`."""
    return engine.backups.begin_upload(data)


@get("/backups/{backup:str}", operation_id="get_backup", tags=TAGS, responses=problems(404), sync_to_thread=False)
def get_backup(engine: Engine, backup: Id) -> Backup:
    """One backup in the spool."""
    return engine.backups.spool.get(backup)


@delete(
    "/backups/{backup:str}",
    operation_id="delete_backup",
    tags=TAGS,
    status_code=204,
    responses=problems(409),
    sync_to_thread=False,
)
def delete_backup(engine: Engine, backup: Id) -> None:
    """Remove a backup from the spool. Absent is success."""
    engine.backups.remove(backup)


class ContentOperation(OpenAPIOperation):
    """The OpenAPI of an upload: its body is a piece of the backup."""

    def __post_init__(self) -> None:
        schema = Schema(type=None, description="The backup from `offset` on")
        self.request_body = RequestBody(content={"application/octet-stream": OpenAPIMediaType(schema=schema)})


@put(
    "/backups/{backup:str}/content",
    operation_id="send_backup",
    tags=TAGS,
    responses=problems(404, 409, 507),
    request_max_body_size=None,
    operation_class=ContentOperation,
)
async def send_backup(engine: Engine, request: Request[Any, Any, Any], backup: Id, offset: Offset = 0) -> Backup:
    """Add to an upload. What came before a connection broke stays."""
    spool = engine.backups.spool
    found, pending = spool.get(backup), bytearray()
    try:
        async for chunk in request.stream():
            pending += chunk
            while len(pending) >= PIECE_BYTES:
                piece = bytes(pending[:PIECE_BYTES])
                del pending[:PIECE_BYTES]
                found = await asyncio.to_thread(spool.append, backup, offset, piece)
                offset += len(piece)
    except InternalServerException as error:
        # The framework's word for a client that went away in the middle of its body.
        await asyncio.to_thread(spool.append, backup, offset, bytes(pending))
        raise Invalid(f"the upload broke off after {offset + len(pending)} bytes") from error
    if pending:
        found = await asyncio.to_thread(spool.append, backup, offset, bytes(pending))
    return found


@get(
    "/backups/{backup:str}/content",
    operation_id="receive_backup",
    tags=TAGS,
    media_type="application/octet-stream",
    responses=problems(404, 409),
)
async def receive_backup(engine: Engine, backup: Id, content_range: Range = None) -> Stream:
    """The backup, from where `Range: bytes=N-` says (then the answer is 206)."""
    path = engine.backups.spool.whole(backup)
    size_bytes, start = path.stat().st_size, 0
    match = _RANGE.match(content_range or "")
    headers = {"Accept-Ranges": "bytes"}
    if match is not None:
        start = int(match[1])
        if start > size_bytes:
            raise Invalid(f"backup '{backup}' has {size_bytes} bytes; there is nothing at {start}")
        headers["Content-Range"] = f"bytes {start}-{max(start, size_bytes - 1)}/{size_bytes}"
    headers["Content-Length"] = str(size_bytes - start)
    return Stream(
        _pieces(path, start),
        status_code=200 if match is None else 206,
        headers=headers,
        media_type="application/octet-stream",
    )


async def _pieces(path: Path, start: int) -> AsyncIterator[bytes]:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece


@change(post, "/backups/{backup:str}/import", "import_machine", TAGS, 403, *CHANGE_PROBLEMS)
async def import_machine(engine: Engine, backup: Id, data: ImportMachine) -> Response[Operation]:
    """Make the machine of a backup that was uploaded whole; the operation's result is its name."""
    return accepted(await engine.backups.import_(backup, data))


HANDLERS = (
    copy_machine,
    export_machine,
    list_backups,
    upload_backup,
    get_backup,
    delete_backup,
    send_backup,
    receive_backup,
    import_machine,
)
