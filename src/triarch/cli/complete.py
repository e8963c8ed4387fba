"""What the shell's completion offers for names. It asks a daemon that runs, never starts one, and never complains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from triarch.cli.arguments import Completer

if TYPE_CHECKING:
    from triarch.client import Client


def _completer(names: Callable[[Client, click.Context], Iterable[str]]) -> Completer:
    """A completer of the names that `names` gets from the daemon."""

    @functools.wraps(names)
    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        from triarch.cli.session import Session
        from triarch.errors import Error

        try:
            client = Session(ctx.find_root().params.get("root")).running_client()
            found = names(client, ctx) if client is not None else ()
            return sorted({name for name in found if name.startswith(incomplete)})
        except (Error, OSError):
            return []

    return complete


@_completer
def machines(client: Client, _: click.Context) -> Iterable[str]:
    return (view.name for view in client.machines())


@_completer
def templates(client: Client, _: click.Context) -> Iterable[str]:
    """Names, and single levels once a template has several."""
    found = client.templates()
    names = [template.name for template in found]
    return (*names, *(template.ref for template in found if names.count(template.name) > 1))


@_completer
def architectures(client: Client, _: click.Context) -> Iterable[str]:
    return (architecture.name for architecture in client.architectures() if architecture.available)


@_completer
def snapshots(client: Client, ctx: click.Context) -> Iterable[str]:
    """Of the machine that the command line has named already."""
    name = ctx.params.get("name")
    return (snapshot.name for snapshot in client.snapshots.list(name)) if name else ()


@_completer
def devices(client: Client, ctx: click.Context) -> Iterable[str]:
    """Of the machine that the command line has named already."""
    name = ctx.params.get("name")
    return (device.name for device in client.devices.list(name)) if name else ()


@_completer
def operations(client: Client, _: click.Context) -> Iterable[str]:
    return (operation.id for operation in client.operations() if not operation.status.ended)


@_completer
def machines_and_operations(client: Client, _: click.Context) -> Iterable[str]:
    names = [view.name for view in client.machines()]
    return (*names, *(operation.id for operation in client.operations() if not operation.status.ended))


@_completer
def profiles(client: Client, _: click.Context) -> Iterable[str]:
    return (profile.name for profile in client.profiles.list())


@_completer
def networks(client: Client, _: click.Context) -> Iterable[str]:
    return (network.name for network in client.networks.list())


def settings(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Keys of settings, up to and with the `=`."""
    from triarch.model.setting_text import KEYS

    return [f"{key.name}." if key.has_parts else f"{key.name}=" for key in KEYS if key.name.startswith(incomplete)]
