"""Commands about networks and their access lists."""

from __future__ import annotations

from typing import Any, Literal

import click
from msgspec import UNSET

from triarch.cli.arguments import NounGroup, apply_all, completes, examples
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column, age, output_option, print_record
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.errors import Invalid
from triarch.model.names import check_network_name
from triarch.model.network import (
    AclRule,
    AddAclRule,
    CreateNetwork,
    Direction,
    EditNetwork,
    NetworkKind,
    NetworkView,
    Protocol,
)

_network_argument = click.argument("name", metavar="NETWORK", shell_complete=completes("networks"))


@click.group(
    "network",
    short_help="Networks, and who may reach whom on them.",
    cls=NounGroup,
    epilog=examples(
        "triarch network create front",
        "triarch launch bookworm web --network front -p 0.0.0.0:8080:80",
        "triarch network acl add front deny ingress --label role=db --peer 0.0.0.0/0",
    ),
)
def network_command() -> None:
    """Networks beside the built-in 'nat': their ranges, and who may reach whom."""


COLUMNS = (
    Column[NetworkView]("NAME", lambda view: view.name),
    Column[NetworkView]("KIND", lambda view: view.kind.value),
    Column[NetworkView]("IPV4", lambda view: view.ipv4 or "-", machine_value=lambda view: view.ipv4 or ""),
    Column[NetworkView]("IPV6", lambda view: view.ipv6 or "-", machine_value=lambda view: view.ipv6 or ""),
    Column[NetworkView]("PARENT", lambda view: view.parent or "-", machine_value=lambda view: view.parent or ""),
    Column[NetworkView]("MACHINES", lambda view: str(len(view.machines)), right=True),
)
MORE_COLUMNS = (
    Column[NetworkView]("RULES", lambda view: str(len(view.acl)), right=True),
    Column[NetworkView]("DESCRIPTION", lambda view: view.description or "-"),
)
INFO_COLUMNS = (
    Column[NetworkView]("Name", lambda view: view.name),
    Column[NetworkView]("Kind", lambda view: view.kind.value),
    Column[NetworkView]("IPv4", lambda view: view.ipv4 or "-"),
    Column[NetworkView]("IPv6", lambda view: view.ipv6 or "-"),
    Column[NetworkView]("Parent", lambda view: view.parent or "-"),
    Column[NetworkView]("Gateway", lambda view: view.gateway or ("the host" if view.kind is NetworkKind.NAT else "-")),
    Column[NetworkView]("Name server", lambda view: view.nameserver or ("the host" if view.dns else "-")),
    Column[NetworkView]("DHCP", lambda view: "yes" if view.dhcp else "no"),
    Column[NetworkView]("DNS", lambda view: "yes" if view.dns else "no"),
    Column[NetworkView]("Rules", lambda view: str(len(view.acl))),
    Column[NetworkView]("Machines", lambda view: ", ".join(view.machines) or "-"),
    Column[NetworkView]("Labels", lambda view: " ".join(f"{k}={v}" for k, v in sorted(view.labels.items())) or "-"),
    Column[NetworkView]("Description", lambda view: view.description or "-"),
    Column[NetworkView](
        "Created", lambda view: age(view.created_at), machine_value=lambda view: view.created_at.isoformat()
    ),
    Column[NetworkView]("Operation", lambda view: view.operation or "-"),
)


@network_command.command("list", epilog=examples("triarch network list", "triarch network ls -o json"))
@list_options(COLUMNS, MORE_COLUMNS, complete=completes("networks"))
@click.pass_obj
def network_list(session: Session, listing: Listing[NetworkView]) -> None:
    """List networks."""
    client = session.running_client()
    listing.print(() if client is None and session.never_used else (client or session.client).networks.list())


@network_command.command("info", epilog=examples("triarch network info nat", "triarch network info front -o yaml"))
@_network_argument
@output_option
@click.pass_obj
def network_info(session: Session, name: str, output_format: str) -> None:
    """Show all about one network."""
    print_record(session.client.networks.get(name), INFO_COLUMNS, output_format)


def _editable_options(command: Any) -> Any:
    """What may be said at the start and later on."""
    return apply_all(
        command,
        click.option("--gateway", metavar="ADDRESS", help="The way out of a bridge or macvlan network with --ipv4."),
        click.option("--nameserver", metavar="ADDRESS", help="Who is asked for names on a bridge or macvlan network."),
        click.option("--dhcp/--no-dhcp", default=None, help="Give machines that ask their addresses (on)."),
        click.option("--dns/--no-dns", default=None, help="Answer for machines' names and aliases (on)."),
        click.option("--label", "labels", metavar="K=V", multiple=True, help="A label of the network."),
        click.option("--description", help="What it is for."),
    )


@network_command.command(
    "create",
    short_help="Make a network.",
    epilog=examples(
        "triarch network create front --ipv4 10.9.0.0/24",
        "triarch network create lab --kind isolated",
        "triarch network create lan --kind bridge --parent eth1",
    ),
)
@click.argument("name", metavar="NETWORK")
@click.option(
    "--kind",
    type=click.Choice([kind.value for kind in NetworkKind]),
    default="nat",
    show_default=True,
    help="How it reaches beyond its machines.",
)
@click.option("--ipv4", metavar="CIDR", help="Its addresses, such as 10.9.0.0/24 (a free range).")
@click.option("--ipv6", metavar="CIDR", help="Its IPv6 addresses, or 'none' (a free local range).")
@click.option("--parent", metavar="INTERFACE", help="The host's interface of a bridge or macvlan network.")
@click.option("--force", is_flag=True, help="Take a parent that has addresses: the host can use them no longer.")
@_editable_options
@click.pass_obj
def network_create(
    session: Session,
    /,
    name: str,
    kind: str,
    ipv4: str | None,
    ipv6: str | None,
    parent: str | None,
    force: bool,
    **values: Any,
) -> None:
    """Make a network: nat, isolated, a bridge to an interface of the host, or macvlans on one."""
    check_network_name(name)
    given = {key: value for key, value in _edited(values).items() if value is not UNSET}
    request = CreateNetwork(
        name=name, kind=NetworkKind(kind), ipv4=ipv4, ipv6=ipv6, parent=parent, force=force, **given
    )
    finish(session.client, session.client.networks.create(request))
    view = session.client.networks.get(name)
    print(f"network {view.name}  {view.kind.value}  {view.ipv4 or view.parent or ''}")


def _edited(values: dict[str, Any]) -> dict[str, Any]:
    labels = dict(_label(text) for text in values["labels"])
    given = {**values, "labels": labels or None}
    return {key: UNSET if value is None else value for key, value in given.items()}


def _label(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not key:
        raise Invalid(f"illegal label '{text}': it needs NAME=VALUE")
    return key, value


@network_command.command(
    "edit", epilog=examples("triarch network edit front --no-dhcp", "triarch network edit front --description 'web'")
)
@_network_argument
@_editable_options
@click.pass_obj
def network_edit(session: Session, /, name: str, **values: Any) -> None:
    """Change a network; machines that run are held to it at once."""
    finish(session.client, session.client.networks.edit(name, EditNetwork(**_edited(values))))


@network_command.command(
    "delete", epilog=examples("triarch network delete front", "triarch network rm front --dry-run")
)
@click.argument("names", metavar="NETWORK...", nargs=-1, required=True, shell_complete=completes("networks"))
@dry_run_option
@click.pass_obj
def network_delete(session: Session, names: tuple[str, ...], dry_run: bool) -> int:
    """Delete networks that no machine is on."""
    client = session.client
    if dry_run:
        for name in names:
            client.networks.get(name)
            would("delete", f"network {name}")
        return 0
    return each(names, lambda name: finish(client, client.networks.delete(name)))


# -- access lists


class NumberedRule(AclRule, frozen=True, kw_only=True):
    """A rule and its place in the list, from 1."""

    position: int


RULE_COLUMNS = (
    Column[NumberedRule]("RULE", lambda rule: str(rule.position), right=True),
    Column[NumberedRule]("ACTION", lambda rule: "allow" if rule.allow else "deny"),
    Column[NumberedRule]("DIRECTION", lambda rule: rule.direction.value),
    Column[NumberedRule]("MACHINE", lambda rule: rule.machine or "-"),
    Column[NumberedRule]("LABEL", lambda rule: rule.label or "-"),
    Column[NumberedRule]("PEER", lambda rule: rule.peer or "-"),
    Column[NumberedRule]("PROTOCOL", lambda rule: rule.protocol.value if rule.protocol else "-"),
    Column[NumberedRule]("PORTS", lambda rule: ",".join(map(str, rule.ports)) or "-"),
)


@network_command.group(
    "acl",
    short_help="A network's access list.",
    cls=NounGroup,
    epilog=examples("triarch network acl list nat", "triarch network acl remove nat 1"),
)
def acl_group() -> None:
    """A network's access list: the first rule that matches decides, what none matches is allowed."""


@acl_group.command("list", epilog=examples("triarch network acl list nat", "triarch network acl list nat -o csv"))
@_network_argument
@list_options(RULE_COLUMNS, (), complete=completes("networks"))
@click.pass_obj
def acl_list(session: Session, listing: Listing[NumberedRule], name: str) -> None:
    """Show the rules of a network, in their order."""
    rules = session.client.networks.get(name).acl
    fields = AclRule.__struct_fields__
    listing.print(
        [
            NumberedRule(position=number, **{field: getattr(rule, field) for field in fields})
            for number, rule in enumerate(rules, 1)
        ]
    )


@acl_group.command(
    "add",
    epilog=examples(
        "triarch network acl add nat deny egress --peer 10.0.0.0/8",
        "triarch network acl add nat allow ingress --label role=web --protocol tcp --ports 80,443 --position 1",
        "triarch network acl add nat deny ingress --machine db",
    ),
)
@_network_argument
@click.argument("action", type=click.Choice(["allow", "deny"]))
@click.argument("direction", type=click.Choice([direction.value for direction in Direction]))
@click.option("--machine", metavar="NAME", help="Only for this machine.", shell_complete=completes("machines"))
@click.option("--label", metavar="K[=V]", help="Only for machines with this label.")
@click.option("--peer", metavar="PEER", help="Who is at the other end: a CIDR, machine:NAME or label:K=V.")
@click.option("--protocol", type=click.Choice([protocol.value for protocol in Protocol]), help="Only this protocol.")
@click.option("--ports", metavar="N,N", default="", help="Ports of the one who is called.")
@click.option("--position", type=click.IntRange(min=1), help="Before the rule that is there now (at the end).")
@click.pass_obj
def acl_add(
    session: Session,
    /,
    name: str,
    action: Literal["allow", "deny"],
    direction: str,
    protocol: str | None,
    ports: str,
    position: int | None,
    **who: str | None,
) -> None:
    """Add a rule; running machines are held to it at once."""
    rule = AclRule(
        direction=Direction(direction),
        allow=action == "allow",
        protocol=None if protocol is None else Protocol(protocol),
        ports=_ports(ports),
        machine=who["machine"],
        label=who["label"],
        peer=who["peer"],
    )
    finish(session.client, session.client.networks.add_rule(name, AddAclRule(rule=rule, position=position)))


def _ports(text: str) -> tuple[int, ...]:
    words = [word for word in text.split(",") if word]
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= 65535 for word in words):
        raise Invalid(f"illegal ports '{text}': it needs numbers from 1 to 65535, such as 80,443")
    return tuple(int(word) for word in words)


@acl_group.command("remove", epilog=examples("triarch network acl remove nat 1"))
@_network_argument
@click.argument("position", type=click.IntRange(min=1))
@click.pass_obj
def acl_remove(session: Session, name: str, position: int) -> None:
    """Remove the rule at POSITION, as `acl list` shows it."""
    finish(session.client, session.client.networks.remove_rule(name, position))
