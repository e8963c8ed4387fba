"""Waiting for a machine to be in a state, or to be well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from triarch.engine.events import EventBus
from triarch.errors import Exhausted
from triarch.model.machine import MachineView


async def wait_until(
    events: EventBus, look: Callable[[], MachineView], words: Collection[str], timeout_seconds: float
) -> MachineView:
    """The machine once `words` name its state or its health, or as it is after the timeout.

    `look` raises when the machine is gone. Whatever changes a machine is told as an event, so between events nothing
    needs to be looked at.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                stream = events.subscribe()
                try:
                    if _holds(view := look(), words):
                        return view
                    async for event in stream:
                        if event.target == f"machine/{view.name}" and _holds(look(), words):
                            return look()
                except Exhausted:
                    # So much happened that some of it was lost: look, and listen anew.
                    continue
                finally:
                    await stream.aclose()
    except TimeoutError:
        return look()


def _holds(view: MachineView, words: Collection[str]) -> bool:
    return view.state.value in words or (view.health is not None and view.health.value in words)
