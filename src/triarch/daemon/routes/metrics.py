"""Figures for Prometheus, where it looks for them by itself and among the other routes."""

from __future__ import annotations

from litestar import Response, get

from triarch.daemon.problems import problems
from triarch.engine.engine import Engine
from triarch.engine.metrics import CONTENT_TYPE


@get("/metrics", operation_id="metrics", tags=["usage"], media_type="text/plain", responses=problems())
async def metrics(engine: Engine) -> Response[str]:
    """Machines, operations, pools and the host in Prometheus' text format."""
    return Response(await engine.usages.metrics(), media_type=CONTENT_TYPE)


@get("/metrics", media_type="text/plain", include_in_schema=False)
async def metrics_at_root(engine: Engine) -> Response[str]:
    """The same at the path that Prometheus asks by default."""
    return Response(await engine.usages.metrics(), media_type=CONTENT_TYPE)


HANDLERS = (metrics,)
ROOT_HANDLERS = (metrics_at_root,)
