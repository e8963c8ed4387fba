"""Importing a root filesystem archive: tar, plain or packed with gzip, xz, zstd or bzip2, told apart by content."""

from __future__ import annotations

from pathlib import Path

from triarch.model.names import check_template_name
from triarch.model.operation import Progress
from triarch.model.template import Init
from triarch.templates.image import Report, TreeDraft, make_image
from triarch.templates.members import Limits


async def import_tree(
    name: str, archive: Path, workspace: Path, progress: Report, *, limits: Limits | None = None
) -> TreeDraft:
    """Make an image of `archive` in `workspace`. The template boots its own `/sbin/init` where it has one.

    Nothing is ever unpacked on the host and no privilege is needed: members become inodes of the image as they are
    read, ownership, modes, times, hard links, extended attributes and fifos included (text ACLs of GNU tar's `--acls`
    are not). Raises `Invalid` that names the member which was refused (see `load_tree`), `NotFound`, `MissingProgram`,
    or `Exhausted`; nothing is left then.
    """
    check_template_name(name)

    def report(fraction: float) -> None:
        progress(Progress(step="tree", text="reading the archive", fraction=fraction))

    image = workspace / "tree.erofs"
    facts = await make_image(archive, image, limits=limits or Limits(), report=report)
    command = (facts.shell,) if facts.init is Init.APP and facts.shell else ()
    return TreeDraft(
        image=image,
        init=facts.init,
        command=command,
        os_name=facts.os_name,
        source=f"import of {archive.name}",
        cloud_init=facts.cloud_init,
    )
