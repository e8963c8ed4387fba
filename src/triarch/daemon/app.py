"""The HTTP application: routes, errors, and the OpenAPI document at /schema/openapi.json."""

from __future__ import annotations

from litestar import Litestar, Router
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

import triarch
from triarch.daemon import problems
from triarch.daemon.routes import (
    backups,
    devices,
    events,
    files,
    machines,
    metrics,
    networks,
    operations,
    profiles,
    server,
    snapshots,
    streams,
    templates,
    usage,
    waiting,
)
from triarch.engine.engine import Engine
from triarch.errors import Error

PREFIX = "/1"


def create_app(engine: Engine) -> Litestar:
    """An ASGI application on an open engine."""

    def get_engine() -> Engine:
        return engine

    modules = (
        server,
        machines,
        usage,
        metrics,
        networks,
        devices,
        streams,
        operations,
        profiles,
        snapshots,
        backups,
        templates,
        events,
        waiting,
        files,
    )
    return Litestar(
        route_handlers=[
            Router(path=PREFIX, route_handlers=[h for module in modules for h in module.HANDLERS]),
            *metrics.ROOT_HANDLERS,
        ],
        dependencies={"engine": Provide(get_engine, sync_to_thread=False)},
        exception_handlers={
            Error: problems.on_error,
            ValidationException: problems.on_invalid,
            HTTPException: problems.on_http,
            RecursionError: problems.on_recursion,
            Exception: problems.on_bug,
        },
        openapi_config=OpenAPIConfig(
            title="Triarch",
            version=triarch.__version__,
            description="One machine, any virtualization architecture.",
            path="/schema",
            render_plugins=[JsonRenderPlugin()],
            use_handler_docstrings=True,
        ),
        request_max_body_size=problems.MAX_BODY_BYTES,
        logging_config=None,
    )
