"""A machine as drivers see it, for peers that run what a driver would run."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from bench.ground import Ground
from triarch.model.driver import GuestPack, LayerFile, MachineSpec
from triarch.model.machine import Machine
from triarch.model.network import NoLink
from triarch.model.template import Init, TemplateRef


def machine_spec(
    ground: Ground, name: str, command: tuple[str, ...], guest_pack: GuestPack | None = None
) -> MachineSpec:
    """An `app` machine without network that no engine knows of. Its paths lead into the ground's directory."""
    template = ground.template
    (layer,) = template.layers
    machine = Machine(
        name=name,
        uuid=str(uuid.uuid4()),
        index=1,
        template=TemplateRef(name=template.name, level=template.level, digest=template.digest),
        architecture="peer",
        init=Init.APP,
        command=command,
        network="none",
        ids=ground.instance.id_range(1),
        created_at=datetime.now(UTC),
    )
    directory = ground.directory / name
    return MachineSpec(
        machine=machine,
        template=template,
        layers=(LayerFile(digest=layer.digest, path=str(ground.layer_path), size_bytes=layer.size_bytes),),
        delta_path=str(directory / "delta.raw"),
        link=NoLink(),
        run_dir=str(directory),
        state_dir=str(directory),
        log_path=str(directory / "console.log"),
        cgroup=f"/{ground.directory.name}-{name}",
        guest_pack=guest_pack,
    )
