"""Every value of the model goes through JSON and comes back the same, whatever it holds."""

from __future__ import annotations

import importlib
import pkgutil
from datetime import UTC, datetime
from typing import Any

import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import triarch.model

# Values that never travel: tables of functions, trees of text, plans.
NEVER_SENT = {f"triarch.model.{name}" for name in ("setting_forms", "setting_text", "yaml_tree", "site_plan")}
STRUCTS = sorted(
    {
        value
        for module in pkgutil.iter_modules(triarch.model.__path__, "triarch.model.")
        for value in vars(importlib.import_module(module.name)).values()
        if isinstance(value, type)
        and issubclass(value, msgspec.Struct)
        and value is not msgspec.Struct
        and value.__module__ not in NEVER_SENT
    },
    key=lambda struct: struct.__qualname__,
)
INT_64 = (-(1 << 63), (1 << 63) - 1)
TIMES = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))
# Text that JSON can carry: no half characters.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def values_of(kind: mi.Type) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have, with the limits that it states."""
    match kind:
        case mi.Metadata():
            return values_of(kind.type)
        case mi.IntType():
            return st.integers(INT_64[0] if kind.ge is None else kind.ge, INT_64[1] if kind.le is None else kind.le)
        case mi.FloatType():
            low = kind.ge if kind.ge is not None else kind.gt
            return st.floats(
                low, kind.le, allow_nan=False, allow_infinity=False, exclude_min=kind.gt is not None and kind.ge is None
            )
        case mi.StrType() if kind.pattern is not None:
            return st.from_regex(kind.pattern, alphabet=st.characters(codec="ascii")).filter(
                lambda text: "\n" not in text
            )
        case mi.StrType():
            return TEXT
        case mi.BytesType():
            return st.binary(max_size=100)
        case mi.BoolType():
            return st.booleans()
        case mi.NoneType():
            return st.none()
        case mi.DateTimeType():
            return TIMES
        case mi.EnumType():
            return st.sampled_from(list(kind.cls))
        case mi.LiteralType():
            return st.sampled_from(kind.values)
        case mi.TupleType():
            return st.tuples(*(values_of(each) for each in kind.item_types))
        case mi.VarTupleType():
            return st.lists(values_of(kind.item_type), max_size=3).map(tuple)
        case mi.DictType():
            return st.dictionaries(values_of(kind.key_type), values_of(kind.value_type), max_size=3)
        case mi.UnionType():
            return st.one_of([values_of(each) for each in kind.types])
        case mi.StructType():
            return st.builds(kind.cls, **{field.name: values_of(field.type) for field in kind.fields})
    raise NotImplementedError(f"a field of the model has type {kind}, which this test does not know yet")


def test_there_are_some() -> None:
    assert len(STRUCTS) > 30


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__qualname__)
def test_frozen_and_documented(struct: type[msgspec.Struct]) -> None:
    assert struct.__struct_config__.frozen
    assert struct.__doc__ and struct.__doc__.strip()


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__qualname__)
def test_round_trip(struct: type[msgspec.Struct]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(values_of(mi.type_info(struct)))
    def there_and_back(value: msgspec.Struct) -> None:
        text = msgspec.json.encode(value)
        assert msgspec.json.decode(text, type=struct) == value
        assert msgspec.json.encode(msgspec.json.decode(text, type=struct)) == text

    there_and_back()


@pytest.mark.parametrize(
    "struct",
    [struct for struct in STRUCTS if struct.__struct_config__.forbid_unknown_fields],
    ids=lambda struct: struct.__qualname__,
)
def test_a_misspelt_field_of_a_request_is_refused(struct: type[msgspec.Struct]) -> None:
    @settings(max_examples=5, deadline=None)
    @given(values_of(mi.type_info(struct)))
    def with_one_more(value: msgspec.Struct) -> None:
        body = {**msgspec.to_builtins(value), "misspelt": 1}
        with pytest.raises(msgspec.ValidationError, match="misspelt"):
            msgspec.convert(body, type=struct)

    with_one_more()


def test_every_body_of_a_request_forbids_unknown_fields() -> None:
    """What people write is checked to the letter; what is stored may gain fields."""
    from triarch.model import machine, request

    bodies = [
        machine.CreateMachine,
        machine.StopMachine,
        machine.RenameMachine,
        machine.SwitchMachine,
        request.BuildTemplate,
    ]
    assert all(body.__struct_config__.forbid_unknown_fields for body in bodies)
