"""Podman's profile, resolved."""

from __future__ import annotations

from pathlib import Path

import pytest

from triarch.drivers.container.config import APP_CAPABILITIES, SYSTEM_CAPABILITIES
from triarch.drivers.container.seccomp import (
    NEVER_ALLOWED,
    PROFILE_PATHS,
    Condition,
    FilterCache,
    Profile,
    ProfileRule,
    Seccomp,
    load_profile,
    resolve,
)

needs_profile = pytest.mark.skipif(
    not any(path.exists() for path in PROFILE_PATHS), reason="golang-github-containers-common is not installed"
)


def allowed(seccomp: Seccomp) -> set[str]:
    return {name for rule in seccomp.syscalls if rule.action == "SCMP_ACT_ALLOW" for name in rule.names}


@needs_profile
@pytest.mark.parametrize("capabilities", [APP_CAPABILITIES, SYSTEM_CAPABILITIES])
def test_the_hosts_profile(capabilities: tuple[str, ...]) -> None:
    found = allowed(resolve(load_profile(), capabilities, machine="x86_64", kernel="6.1.0"))
    assert {"read", "execve", "clone3", "openat2"} <= found
    assert not found & NEVER_ALLOWED
    assert ("vhangup" in found) == ("CAP_SYS_TTY_CONFIG" in capabilities)


@needs_profile
def test_fewer_capabilities_allow_fewer_calls() -> None:
    app = allowed(resolve(load_profile(), APP_CAPABILITIES, machine="x86_64", kernel="6.1.0"))
    system = allowed(resolve(load_profile(), SYSTEM_CAPABILITIES, machine="x86_64", kernel="6.1.0"))
    assert app < system


def test_conditions() -> None:
    def rule(name: str, includes: Condition = Condition(), excludes: Condition = Condition()) -> ProfileRule:  # noqa: B008
        return ProfileRule(action="SCMP_ACT_ALLOW", names=(name,), includes=includes, excludes=excludes)

    profile = Profile(
        default_action="SCMP_ACT_ERRNO",
        syscalls=(
            rule("always"),
            rule("with", Condition(caps=("CAP_A",))),
            rule("without", excludes=Condition(caps=("CAP_A",))),
            rule("arm", Condition(arches=("arm64",))),
            rule("intel", Condition(arches=("amd64", "x86"))),
            rule("not-intel", excludes=Condition(arches=("amd64",))),
            rule("new", Condition(minKernel="6.2")),
            rule("old", Condition(minKernel="4.8")),
        ),
    )
    made = resolve(profile, ("CAP_A",), machine="x86_64", kernel="6.1.0-18-cloud")
    assert allowed(made) == {"always", "with", "intel", "old"}
    made = resolve(profile, (), machine="aarch64", kernel="6.2")
    assert allowed(made) == {"always", "without", "arm", "not-intel", "new", "old"}


class TestFilterCache:
    SECCOMP = Seccomp(default_action="SCMP_ACT_ERRNO", architectures=(), syscalls=())

    def test_keeps_and_gives(self, tmp_path: Path) -> None:
        compiled = tmp_path / "compiled"
        compiled.write_bytes(b"ABC")
        cache = FilterCache(tmp_path / "cache", "crun 1")
        assert cache.get(self.SECCOMP) is None
        cache.keep(self.SECCOMP, compiled)
        assert cache.get(self.SECCOMP) == "QUJD"
        assert FilterCache(tmp_path / "cache", "crun 1").get(self.SECCOMP) == "QUJD"

    def test_another_runtime_compiles_anew(self, tmp_path: Path) -> None:
        compiled = tmp_path / "compiled"
        compiled.write_bytes(b"ABC")
        FilterCache(tmp_path / "cache", "crun 1").keep(self.SECCOMP, compiled)
        assert FilterCache(tmp_path / "cache", "crun 2").get(self.SECCOMP) is None

    @pytest.mark.parametrize("content", [b"", bytes(1 << 17)])
    def test_nonsense_is_not_used(self, tmp_path: Path, content: bytes) -> None:
        compiled = tmp_path / "compiled"
        compiled.write_bytes(content)
        cache = FilterCache(tmp_path / "cache", "crun 1")
        cache.keep(self.SECCOMP, compiled)
        assert cache.get(self.SECCOMP) is None

    def test_a_file_that_others_may_write_is_not_used(self, tmp_path: Path) -> None:
        compiled = tmp_path / "compiled"
        compiled.write_bytes(b"ABC")
        cache = FilterCache(tmp_path / "cache", "crun 1")
        cache.keep(self.SECCOMP, compiled)
        for path in (tmp_path / "cache").iterdir():
            path.chmod(0o666)
        assert cache.get(self.SECCOMP) is None
