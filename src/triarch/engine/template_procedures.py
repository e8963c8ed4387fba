"""Templates come and go as operations too: built or imported in a workspace, then added to the pool and recorded."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.errors import Failed
from triarch.model.operation import Progress
from triarch.model.request import BuildTemplate
from triarch.model.template import Template, template_digest

if TYPE_CHECKING:
    from triarch.templates.image import TreeDraft


class TemplateArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`workspace` is scratch space of this operation alone; `request` is there for a build, `archive` for an import."""

    name: str
    level: int = 1
    workspace: str = ""
    request: BuildTemplate | None = None
    archive: str = ""
    templates: tuple[Template, ...] = ()


class TemplateProcedure:
    """What all verbs of a template share."""

    verb: ClassVar[str]
    arguments_type: ClassVar[type[msgspec.Struct]] = TemplateArguments

    def __init__(self, services: Services, arguments: TemplateArguments) -> None:
        self.services = services
        self.arguments = arguments
        self._draft: TreeDraft | None = None
        self._template: Template | None = None

    @property
    def target(self) -> str:
        return f"template/{self.arguments.name}"

    @property
    def result(self) -> str | None:
        return None if self._template is None else self._template.ref

    def steps(self) -> tuple[Step, ...]:
        raise NotImplementedError

    async def collect(self) -> None:
        await asyncio.to_thread(remove_unused_layers, self.services)


class MakeTemplate(TemplateProcedure):
    """Build or import. Until the record is written, an end of any kind leaves nothing."""

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("workspace", self._make_workspace, self._remove_workspace),
            Step("tree", self._make_tree),
            Step("layer", self._add_layer, self._collect),
            Step("record", self._record, self._forget),
            Step("tidy", self._remove_workspace, commits=True),
        )

    async def _make_workspace(self) -> None:
        Path(self.arguments.workspace).mkdir(mode=0o700, parents=True, exist_ok=True)

    async def _remove_workspace(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self.arguments.workspace, ignore_errors=True)
        if self.arguments.archive:
            Path(self.arguments.archive).unlink(missing_ok=True)

    def _report(self, progress: Progress) -> None:
        self.services.report(self.target, progress)

    async def _make_tree(self) -> None:
        raise NotImplementedError

    async def _add_layer(self) -> None:
        if self._draft is None:
            raise Failed(f"template '{self.arguments.name}' has no tree to add")
        draft = self._draft
        layer = await asyncio.to_thread(self.services.pool.add_layer, draft.image)
        self.services.templates.coming.add(layer.digest)
        self._template = Template(
            name=self.arguments.name,
            level=self.arguments.level,
            digest=template_digest((layer,)),
            layers=(layer,),
            init=draft.init,
            command=draft.command,
            environment=draft.environment,
            os_name=draft.os_name,
            cloud_init=draft.cloud_init,
            created_at=datetime.now(UTC),
            source=draft.source,
        )

    async def _record(self) -> None:
        if self._template is not None:
            await self.services.templates.add(self._template)
            self._came()
            self.services.events.publish("template-created", self.target, {"digest": self._template.digest})

    def _came(self) -> None:
        """It is recorded, or never will be."""
        if self._template is not None:
            self.services.templates.coming -= {layer.digest for layer in self._template.layers}

    async def _collect(self) -> None:
        self._came()
        await self.collect()

    async def _forget(self) -> None:
        written = [t for t in self.services.templates.levels(self.arguments.name) if t.level == self.arguments.level]
        await self.services.templates.remove(tuple(written))


class BuildTree(MakeTemplate):
    verb = "build"

    async def _make_tree(self) -> None:
        from triarch.templates.build import build_tree

        request = self.arguments.request or BuildTemplate(name=self.arguments.name)
        self._draft = await build_tree(request, Path(self.arguments.workspace), self._report)


class ImportTree(MakeTemplate):
    verb = "import"

    async def _make_tree(self) -> None:
        from triarch.templates.importer import import_tree

        archive = Path(self.arguments.archive)
        self._draft = await import_tree(self.arguments.name, archive, Path(self.arguments.workspace), self._report)


class DeleteTemplate(TemplateProcedure):
    """The records go first, then every layer that no template uses."""

    verb = "delete-template"

    @property
    def result(self) -> str | None:
        return ", ".join(template.ref for template in self.arguments.templates)

    def steps(self) -> tuple[Step, ...]:
        return (Step("record", self._remove, commits=True), Step("layers", self.collect))

    async def _remove(self) -> None:
        await self.services.templates.remove(self.arguments.templates)
        self.services.events.publish("template-deleted", self.target)


def remove_unused_layers(services: Services) -> None:
    """Remove every layer of the pool that no template names, recorded or about to be (blocking)."""
    # In this order: what is added from here on is not looked at.
    found = services.pool.layers()
    used = services.templates.coming | {layer.digest for each in services.templates.all() for layer in each.layers}
    for layer in found:
        if layer.digest not in used:
            services.pool.remove_layer(layer.digest)


TEMPLATE_PROCEDURES: tuple[type[TemplateProcedure], ...] = (BuildTree, ImportTree, DeleteTemplate)
