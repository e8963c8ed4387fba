"""Settings of machines on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from triarch.cli.arguments import Number, SizeType, apply_all, completes
from triarch.errors import Invalid
from triarch.model.device import Hardware
from triarch.model.resources import MIN_DISK_BYTES, MIN_MEMORY_BYTES
from triarch.model.setting_forms import parse_forward
from triarch.model.settings import Settings

if TYPE_CHECKING:
    from triarch.model.policy import FirstBoot


def setting_options(command: Any) -> Any:
    """The options of a machine that is to be made; `settings_of` reads them."""
    return apply_all(
        command,
        click.option(
            "--cpus", type=Number(0, 4096, min_open=True), metavar="N", help="Processors, also a fraction: 0.5."
        ),
        click.option("--memory", type=SizeType(MIN_MEMORY_BYTES), metavar="SIZE", help="Memory, such as 512M."),
        click.option("--disk", type=SizeType(MIN_DISK_BYTES), metavar="SIZE", help="Room for what it writes (10G)."),
        click.option("--pids", type=click.IntRange(16, 1 << 22), metavar="N", help="The most processes and threads."),
        click.option("--io-weight", type=click.IntRange(10, 1000), metavar="N", help="Share of the disk (100)."),
        click.option("-e", "--env", "environment", metavar="K=V", multiple=True, help="Environment variable."),
        click.option("--label", "labels", metavar="K=V", multiple=True, help="Label."),
        click.option("--network", metavar="NETWORK", help="A network's name, 'user' or 'none'."),
        click.option("--hardware", type=click.Choice(("paravirt", "emulated")), help="What a VM sees (paravirt)."),
        click.option("-p", "--publish", metavar="HOST:MACHINE", multiple=True, help="Forward a port of the host."),
        click.option(
            "-P",
            "--profile",
            "profiles",
            metavar="PROFILE",
            multiple=True,
            help="Settings of a profile; a later one counts more.",
            shell_complete=completes("profiles"),
        ),
        click.option(
            "-c",
            "--set",
            "words",
            metavar="KEY=VALUE",
            multiple=True,
            help="Any other setting (triarch help settings).",
        ),
        click.option(
            "--first-boot",
            "first_boot",
            type=click.Path(exists=True, dir_okay=False),
            metavar="FILE",
            help="Users, packages, files and commands of its first start (YAML).",
        ),
        click.option(
            "--ssh-key",
            "ssh_keys",
            type=click.Path(exists=True, dir_okay=False),
            metavar="FILE",
            multiple=True,
            help="Public keys that may log in as root from its first start on.",
        ),
    )


def settings_of(values: dict[str, Any]) -> Settings:
    """What the options of `setting_options` say; those of their own count more than `--set`. Raises `Invalid`."""
    given = {
        "cpus": values["cpus"],
        "memory_bytes": values["memory"],
        "disk_bytes": values["disk"],
        "pids": values["pids"],
        "io_weight": values["io_weight"],
        "environment": parse_environment(values["environment"]) or None,
        "labels": read_labels(values["labels"]),
        "network": values["network"],
        "hardware": None if values["hardware"] is None else Hardware(values["hardware"]),
        "forwards": tuple(parse_forward(text) for text in values["publish"]) or None,
        "first_boot": _first_boot(values["first_boot"], values["ssh_keys"]),
    }
    options = Settings(**{key: value for key, value in given.items() if value is not None})
    if not values["words"]:
        return options
    from triarch.model.setting_text import read_settings
    from triarch.model.settings import add_up

    return add_up((read_settings(split_words(values["words"]).items()), options))


def split_words(words: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` words. Raises `Invalid`."""
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise Invalid(f"illegal setting '{word[:80]}': it needs KEY=VALUE, such as memory=2G")
        values[key] = value
    return values


def read_labels(words: Sequence[str]) -> dict[str, str] | None:
    """What `--label` says; None for nothing."""
    if not words:
        return None
    from triarch.model.setting_text import read_settings

    labels = read_settings((f"label.{key}", value) for key, value in split_words(words).items()).labels
    return labels or None


def _first_boot(path: str | None, ssh_keys: Sequence[str]) -> FirstBoot | None:
    if path is None and not ssh_keys:
        return None
    from pathlib import Path

    import msgspec

    from triarch.model.policy import FirstBoot

    first_boot = FirstBoot() if path is None else read_first_boot(path)
    keys = [line.strip() for name in ssh_keys for line in Path(name).read_text().splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if ssh_keys and (not keys or any(" " not in key or "PRIVATE KEY" in key for key in keys)):
        raise Invalid(f"no public keys in {', '.join(ssh_keys)}", hint="ssh-keygen -y -f KEY")
    return msgspec.structs.replace(first_boot, ssh_keys=(*first_boot.ssh_keys, *keys))


def read_first_boot(path: str) -> FirstBoot:
    """A file of first-boot configuration. One that begins with `#cloud-config` or `#!` is cloud-init's user data.

    Raises `Invalid` that names the line.
    """
    from pathlib import Path

    from triarch.model.policy import FirstBoot
    from triarch.model.setting_text import read_settings
    from triarch.model.yaml_tree import MAX_BYTES, find, read_file, written

    with Path(path).open("rb") as opened:
        data = opened.read(MAX_BYTES + 1)
    if data.startswith((b"#cloud-config", b"#!")):
        return FirstBoot(user_data=data.decode())
    file = read_file(path, data)
    try:
        settings = read_settings([("first-boot", written(file.root))])
    except Invalid as error:
        node = find(file.root, str(error.fields.get("path") or ""))
        raise Invalid(f"{file.at(node)}: {error.message}", hint=error.hint) from error
    return settings.first_boot or FirstBoot()


def parse_environment(items: Sequence[str]) -> dict[str, str]:
    """`K=V` words; a bare `K` takes the caller's value. Raises `Invalid`."""
    import os

    environment = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or (not equals and name not in os.environ):
            raise Invalid(f"illegal environment variable '{item}': it needs NAME=VALUE")
        environment[name] = value if equals else os.environ[name]
    return environment
