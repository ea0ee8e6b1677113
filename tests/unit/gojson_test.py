"""Bodies read strictly, faults in the words of Go (checked against encoding/json's scanner and our recordings)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver import gojson

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "EOF"),
        (" \n", "EOF"),
        ("{", "unexpected EOF"),
        ('{"a":1', "unexpected EOF"),
        ('{"a"', "unexpected EOF"),
        ('"abc', "unexpected EOF"),
        ("nul", "unexpected EOF"),
        ("1e", "unexpected EOF"),
        ("hello", "invalid character 'h' looking for beginning of value"),
        ("[1,]", "invalid character ']' looking for beginning of value"),
        ('{"a":1,}', "invalid character '}' looking for beginning of object key string"),
        ("{a:1}", "invalid character 'a' looking for beginning of object key string"),
        ('{"a" 1}', "invalid character '1' after object key"),
        ('{"a":1 "b":2}', "invalid character '\"' after object key:value pair"),
        ("[1 2]", "invalid character '2' after array element"),
        ("nulx", "invalid character 'x' in literal null (expecting 'l')"),
        ("-x", "invalid character 'x' in numeric literal"),
        ("1.x", "invalid character 'x' after decimal point in numeric literal"),
        ("1e+x", "invalid character 'x' in exponent of numeric literal"),
        ('"\\q"', "invalid character 'q' in string escape code"),
        ('"\\u12x4"', "invalid character 'x' in \\u hexadecimal character escape"),
        ('"a\tb"', "invalid character '\\t' in string literal"),
        ('"a\x01b"', "invalid character '\\x01' in string literal"),
        ("'a'", "invalid character '\\'' looking for beginning of value"),
        ("é", "invalid character 'Ã' looking for beginning of value"),
        ("NaN", "invalid character 'N' looking for beginning of value"),
        ("-Infinity", "invalid character 'I' in numeric literal"),
        ("{} x", "invalid character 'x' after top-level value"),
        ("01", "invalid character '1' after top-level value"),
        ('{"a":1,"b":{"c":1,"c":2}}', 'key "c" is given twice in one object'),
        ("[1e999]", "json: cannot unmarshal number 1e999 into Go value of type float64"),
        ("[" * 100_000, "exceeded max depth"),
    ],
)
def test_faults(text: str, message: str):
    with pytest.raises(ValueError) as caught:
        gojson.decode(text)

    assert str(caught.value) == message


@given(VALUES)
def test_valid_json_is_read(value: object):
    assert gojson.decode(json.dumps(value)) == value


@given(VALUES, st.data())
def test_every_broken_text_has_a_message(value: object, data: st.DataObject):
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    broken = text[:at] + data.draw(st.text(alphabet='{}[]",:0.e-+tfn\\ux ', max_size=2)) + text[at + 1 :]
    try:
        gojson.decode(broken)
    except ValueError as exc:
        message = str(exc)
    else:
        return

    assert message.startswith(("EOF", "unexpected EOF", "invalid character", "key ", "json: "))


def test_numbers_are_go_s():
    assert repr(gojson.decode("[3600000000000.0, 1e3, 0.5, 18446744073709551615, -0, 1e21]")) == (
        "[3600000000000, 1000, 0.5, 18446744073709551615, 0, 1e+21]"
    )
    assert gojson.decode("9" * 25) == 1e25


def test_lone_surrogates_are_replaced():
    assert gojson.decode('{"\\ud800": ["a\\udfffb", "\\ud83d\\ude00"]}') == {"\ufffd": ["a\ufffdb", "\U0001f600"]}


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), (True, "bool"), (1, "number"), (1.5, "number"), ("", "string"), ({}, "object"), ([], "array")],
)
def test_type_names(value: object, name: str):
    assert gojson.type_name(value) == name


@pytest.mark.parametrize("depth", [600, 3000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_beyond_reason_is_a_fault_at_any_depth(depth: int, opening: str, closing: str):
    with pytest.raises(ValueError, match="exceeded max depth"):
        gojson.decode(opening * depth + "1" + closing * depth)


def test_reasonable_nesting_is_read_however_deep_the_caller_is():
    value: object = gojson.decode("[" * gojson.MAX_DEPTH + "]" * gojson.MAX_DEPTH)
    for _ in range(gojson.MAX_DEPTH - 1):
        assert isinstance(value, list)
        (value,) = value
    assert value == []
