"""Two instances on one host never meet."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from triarch.errors import Exhausted
from triarch.model.instance import DEFAULT_TAG, MAX_MACHINES, Instance, default_instance, instance_at

IFNAMSIZ = 16  # with the closing NUL: linux/if.h
SUN_PATH = 108  # with the closing NUL: unix(7)
UUID = "12345678-1234-1234-1234-123456789abc"


def named(instance: Instance) -> set[str]:
    """Every name that all instances of a host share a space for."""
    return {
        instance.tag,
        instance.state_dir,
        instance.run_dir,
        str(instance.socket_path),
        instance.bridge,
        instance.cgroup(UUID),
        *(instance.host_interface(index) for index in (1, 2, 99_999)),
    }


def test_roots_share_no_name(tmp_path: Path) -> None:
    instances = [default_instance(0), *(instance_at(tmp_path / str(number), 0) for number in range(200))]
    for one, other in itertools.combinations(instances, 2):
        assert not named(one) & named(other)


def test_no_interface_is_taken_for_a_bridge(tmp_path: Path) -> None:
    instances = [default_instance(0), *(instance_at(tmp_path / str(number), 0) for number in range(200))]
    bridges = {instance.bridge for instance in instances}
    assert not bridges & {instance.host_interface(index) for instance in instances for index in (1, 22, 333)}


@pytest.mark.parametrize("index", [1, 99_999])
def test_interface_names_fit(tmp_path: Path, index: int) -> None:
    for instance in (default_instance(0), instance_at(tmp_path, 0)):
        assert len(instance.host_interface(index)) < IFNAMSIZ
        assert len(instance.bridge) < IFNAMSIZ


def test_one_root_is_one_instance_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    wanted = instance_at(tmp_path / "real", 0)
    for root in ("real", "./real", "link", "real/../real", str(tmp_path / "link")):
        assert instance_at(root, 0) == wanted


def test_socket_paths_fit_however_long_the_root_is() -> None:
    instance = instance_at("/" + "/".join(["very-long-directory"] * 50), 0)
    deepest = instance.machine_run_dir(UUID) / "a-name-of-thirty-characters.sock"
    assert len(str(deepest)) < SUN_PATH


def test_a_root_may_have_any_name(tmp_path: Path) -> None:
    for name in ("with space", "new\nline", "ü", "\udcff"):
        instance = instance_at(tmp_path / name, 0)
        assert instance.tag.isalnum() and instance.run_dir == f"/run/triarch-{instance.tag}"


def test_id_ranges_of_machines_are_apart(tmp_path: Path) -> None:
    for instance in (default_instance(0), instance_at(tmp_path, 0)):
        ranges = [instance.id_range(index) for index in range(1, MAX_MACHINES + 1)]
        assert all(ids.count == 65_536 and ids.base % 65_536 == 0 for ids in ranges)
        assert len({ids.base for ids in ranges}) == MAX_MACHINES
        # Not the host's own people, and all below the id -1 that setuid(2) reserves.
        assert min(ids.base for ids in ranges) >= 1 << 20
        assert max(ids.base + ids.count for ids in ranges) < 1 << 32


def test_every_region_is_apart_from_the_next() -> None:
    """Tags that differ by one are in neighbouring regions; the last of one comes before the first of the next."""
    regions = [Instance(tag=tag, state_dir="", run_dir="") for tag in (DEFAULT_TAG, *(f"{n:06x}" for n in range(7)))]
    ends = [(instance.id_range(1).base, instance.id_range(MAX_MACHINES).base) for instance in regions]
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("index", [0, -1, MAX_MACHINES + 1])
def test_ids_run_out_in_words(tmp_path: Path, index: int) -> None:
    with pytest.raises(Exhausted):
        instance_at(tmp_path, 0).id_range(index)


def test_a_plain_user_has_a_private_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    mine = default_instance(1000)
    assert not mine.of_root
    assert mine.state_dir == str(tmp_path / "data" / "triarch")
    assert mine.run_dir == str(tmp_path / "run" / "triarch")


def test_a_plain_user_without_a_session_has_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert default_instance(1000).run_dir == "/tmp/triarch-1000/triarch"
    assert default_instance(1001).run_dir != default_instance(1000).run_dir
