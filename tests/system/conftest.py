"""What several system tests share: one instance with a template that takes a minute to build."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from container_rig import skip_without_busybox
from site_rig import Site

from triarch.testing.leaks import leaks


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    skip_without_busybox()
    site = Site(tmp_path_factory.mktemp("site") / "root")
    site.run("template", "build", "bookworm")
    yield site
    site.run("down")
    assert leaks(site.instance) == ()
