"""Templates: look, build, import, delete."""

from __future__ import annotations

import asyncio
import errno
import secrets
import shutil
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from litestar import Request, Response, delete, get, post, put
from litestar.exceptions import InternalServerException
from litestar.openapi.spec import OpenAPIMediaType, RequestBody, Schema
from litestar.openapi.spec import Operation as OpenAPIOperation
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.operations import LOCATION, accepted, change
from triarch.engine.engine import Engine
from triarch.errors import Exhausted, Invalid
from triarch.model.names import TEMPLATE_NAME_PATTERN, check_template_name
from triarch.model.operation import Operation
from triarch.model.request import BuildTemplate
from triarch.model.template import Template

WRITE_BYTES = 1 << 20
TAGS = ["templates"]
Ref = Annotated[str, Parameter(description="`NAME` (its newest level) or `NAME@LEVEL`")]
Name = Annotated[str, Parameter(description="The new template's name", schema_extra={"pattern": TEMPLATE_NAME_PATTERN})]


@get("/templates", operation_id="list_templates", tags=TAGS, responses=problems(), sync_to_thread=False)
def list_templates(engine: Engine) -> tuple[Template, ...]:
    """All levels of all templates, sorted by name and level."""
    return engine.templates()


@get("/templates/{name:str}", operation_id="get_template", tags=TAGS, responses=problems(404), sync_to_thread=False)
def get_template(engine: Engine, name: Ref) -> Template:
    """One level of a template."""
    return engine.template(name)


@change(delete, "/templates/{name:str}", "delete_template", TAGS, 404, 409)
async def delete_template(engine: Engine, name: Ref) -> Response[Operation]:
    """Delete one level, or with a bare name all levels, of a template that no machine stands on."""
    return accepted(await engine.delete_template(name))


@change(post, "/templates", "build_template", TAGS, 409, 413, 503, 507)
async def build_template(engine: Engine, data: BuildTemplate) -> Response[Operation]:
    """Build a Debian tree."""
    return accepted(await engine.build_template(data))


class UploadOperation(OpenAPIOperation):
    """The OpenAPI of an upload: its body is the archive itself."""

    def __post_init__(self) -> None:
        schema = Schema(type=None, description="A root file system as tar, plain or compressed with gzip, xz or zstd")
        self.request_body = RequestBody(content={"application/octet-stream": OpenAPIMediaType(schema=schema)})


@put(
    "/templates/{name:str}",
    operation_id="import_template",
    tags=TAGS,
    status_code=202,
    responses=problems(409, 507),
    response_headers=LOCATION,
    request_max_body_size=None,
    operation_class=UploadOperation,
)
async def import_template(engine: Engine, request: Request[Any, Any, Any], name: Name) -> Response[Operation]:
    """Make a template from an uploaded archive."""
    check_template_name(name)
    archive = await _spool(request, Path(engine.instance.state_dir) / "work")
    try:
        return accepted(await engine.import_template(name, archive))
    except BaseException:
        archive.unlink(missing_ok=True)
        raise


async def _spool(request: Request[Any, Any, Any], directory: Path) -> Path:
    """The request's body as a file. Raises `Exhausted` when the disk has not the room; then nothing is left of it."""
    announced = int(request.headers.get("content-length") or 0)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if announced > free:
        raise Exhausted(f"no room for the archive: it has {announced} bytes, {directory} has {free} free")
    path = directory / f"upload-{secrets.token_hex(6)}"
    try:
        # Its files may be secret, and the directory is one that a build's own user passes through.
        path.touch(mode=0o600, exist_ok=False)
        with path.open("r+b", buffering=0) as file:
            received = await _copy(request, file)
        if announced and received != announced:
            raise Invalid(f"the upload broke off: {received} of {announced} bytes came")
        if not received:
            raise Invalid("the archive is empty")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


async def _copy(request: Request[Any, Any, Any], file: BinaryIO) -> int:
    """Large writes in a thread, so that a slow disk holds up this client alone."""
    received = 0
    pending = bytearray()
    try:
        async for chunk in request.stream():
            received += len(chunk)
            pending += chunk
            if len(pending) >= WRITE_BYTES:
                await asyncio.to_thread(_write_all, file, bytes(pending))
                pending.clear()
        await asyncio.to_thread(_write_all, file, bytes(pending))
    except InternalServerException as error:
        # The framework's word for a client that went away in the middle of its body.
        raise Invalid(f"the upload broke off after {received} bytes") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Exhausted(f"no room for the archive: the disk is full after {received} bytes") from error
        raise
    return received


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


HANDLERS = (list_templates, get_template, delete_template, build_template, import_template)
