"""`--dry-run` of what destroys: say what would go, and change nothing."""

from __future__ import annotations

import click

from triarch.cli.output import plain

dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would go; change nothing.")


def would(verb: str, what: str) -> None:
    """One line for each thing, on standard output."""
    print(f"would {verb} {plain(what)}")
