"""Settings as text: whatever is set is read back the same, and no text makes the reader fail in another way."""

from __future__ import annotations

import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_round_trips import TEXT, values_of

from triarch.errors import Invalid
from triarch.model.device import Device
from triarch.model.network import Protocol
from triarch.model.policy import FirstBoot, HealthCheck, Probe, SnapshotSchedule
from triarch.model.setting_text import KEYS, find_key, flat, forget, read_settings, settings_tree, write_settings
from triarch.model.settings import Settings

WORDS = st.from_regex(r"[a-z]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True)
CHECKS = st.one_of(
    st.builds(HealthCheck, command=st.lists(TEXT, min_size=1, max_size=3).map(tuple)),
    st.builds(HealthCheck, probe=st.just(Probe.TCP), port=st.integers(1, 65535)),
    st.builds(
        HealthCheck,
        probe=st.just(Probe.HTTP),
        port=st.integers(1, 65535),
        path=TEXT.map(lambda text: f"/{text}"),
        interval_seconds=st.floats(0.1, 86_400),
        grace_seconds=st.floats(0, 86_400),
        retries=st.integers(1, 1000),
        restart=st.booleans(),
    ),
)
NAMES = st.lists(WORDS, max_size=3).map(tuple)
FIELDS = {field.name: field.type for field in mi.type_info(Settings).fields}  # type: ignore[attr-defined]
SPECIAL: dict[str, st.SearchStrategy[object]] = {
    "health": st.one_of(st.none(), CHECKS),
    "snapshots": st.one_of(st.none(), values_of(mi.type_info(SnapshotSchedule))),
    "aliases": NAMES,
    "depends_on": NAMES,
    "network": WORDS,
    "environment": st.dictionaries(TEXT.filter(bool), TEXT, min_size=1, max_size=3),
    "labels": st.dictionaries(st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), WORDS, min_size=1, max_size=3),
    "devices": st.dictionaries(WORDS, values_of(mi.type_info(Device)), min_size=1, max_size=3),  # type: ignore[arg-type]
    "first_boot": st.one_of(st.none(), values_of(mi.type_info(FirstBoot))),
    "description": TEXT,
    "forwards": values_of(FIELDS["forwards"]).filter(
        lambda forwards: all(forward.protocol is not Protocol.ICMP for forward in forwards)
    ),
}


def one_field(name: str) -> st.SearchStrategy[object]:
    kind = FIELDS[name]
    if name in SPECIAL:
        return SPECIAL[name]
    return values_of(kind)


@st.composite
def any_settings(draw: st.DrawFn) -> Settings:
    chosen = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=6))
    return Settings(**{name: draw(one_field(name)) for name in chosen})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(any_settings())
def test_what_is_written_is_read_back(value: Settings) -> None:
    tree = settings_tree(value)
    assert read_settings(tree.items()) == value
    assert read_settings((setting.key, setting.value) for setting in write_settings(value)) == value


@settings(max_examples=60, deadline=None)
@given(any_settings(), any_settings())
def test_what_is_forgotten_is_as_it_never_was(value: Settings, other: Settings) -> None:
    both = read_settings(settings_tree(other).items(), value)
    kept = forget(both, [key.name for key in KEYS if "." not in key.name] + ["health", "snapshots"])
    assert kept == Settings()


@pytest.mark.parametrize(
    "key", [key for key in KEYS if key.example and key.field != "devices"], ids=lambda key: key.name
)
def test_every_example_is_legal_and_as_it_is_written(key: object) -> None:
    assert isinstance(key, type(KEYS[0]))
    name, _, value = key.example.rpartition("=")
    ground = [("health.tcp", "1"), ("snapshots.every", "1h")] if "." in key.name else []
    value_read = read_settings([*ground, (name or key.name, value)])
    written = {setting.key: setting.text for setting in write_settings(value_read)}
    assert written[name or key.name] == value


JUNK = st.recursive(
    st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([key.name for key in KEYS] + ["health", "snapshots", "env.A", "label.role", "device.x"]), JUNK)
def test_hostile_values_are_refused_as_invalid_or_read(key: str, value: object) -> None:
    try:
        read = read_settings([(key, value)])  # type: ignore[list-item]
    except Invalid as error:
        assert "\n" not in error.message[:0] and error.message
        return
    # What was accepted is within every limit that the API states, too.
    assert msgspec.json.decode(msgspec.json.encode(read), type=Settings) == read
    assert flat(value) is not None  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_other_key_is_unknown(text: str) -> None:
    try:
        named = find_key(text)
    except Invalid as error:
        assert "there is no setting" in error.message
    else:
        assert named.key is None or named.key.name == named.name.partition(".")[0] or named.key.name == named.name
