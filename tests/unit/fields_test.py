"""Reading what somebody else wrote: durations, spellings, types, and all faults at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.fields import (
    REDACTED,
    Fault,
    Fields,
    Secret,
    fault_text,
    format_go_duration,
    go_duration,
    nearest,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("72h", 259200),
        ("72h0m0s", 259200),
        ("1h30m", 5400),
        ("-1.5s", -1.5),
        ("+5m", 300),
        ("0", 0),
        (".5s", 0.5),
        ("1.s", 1),
        ("100ms", 0.1),
        ("7us", 7e-6),
        ("7µs", 7e-6),
        ("7μs", 7e-6),
        ("2540400h10m10.000000000s", 2540400 * 3600 + 610),
    ],
)
def test_go_durations(text: str, seconds: float):
    assert go_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'time: invalid duration ""'),
        ("abc", 'time: invalid duration "abc"'),
        ("-", 'time: invalid duration "-"'),
        (".s", 'time: invalid duration ".s"'),
        ("3000000h", 'time: invalid duration "3000000h"'),
        ("9" * 5000 + "h", f'time: invalid duration "{"9" * 5000}h"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1h 2m", 'time: unknown unit "h " in duration "1h 2m"'),
        ("72", 'time: missing unit in duration "72"'),
    ],
)
def test_faulty_durations_are_told_in_the_words_of_go(text: str, message: str):
    with pytest.raises(ValueError, match="time: ") as caught:
        go_duration(text)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (90.5, "1m30.5s"), (3600, "1h0m0s"), (777600, "216h0m0s"), (-60, "-1m0s")],
)
def test_durations_are_printed_as_go_does(seconds: float, text: str):
    assert format_go_duration(seconds) == text


@given(st.integers(-(10**9), 10**9))
def test_printed_durations_read_back(seconds: int):
    assert go_duration(format_go_duration(seconds)) == seconds


@given(st.text(max_size=12))
def test_no_duration_text_does_more_than_fail(text: str):
    try:
        go_duration(text)
    except ValueError as exc:
        message = str(exc)
    else:
        return

    assert message.startswith("time: ")


def test_secrets_do_not_show():
    secret = Secret("hush")

    assert f"{secret} {secret!r} {[secret]}" == f"{REDACTED} {REDACTED} [{REDACTED}]"
    assert (secret.reveal(), secret == Secret("hush"), secret == Secret("loud")) == ("hush", True, False)


def test_either_spelling_is_read():
    for key in ("LeafCertTTL", "leafCertTTL", "leafcertttl", "leaf_cert_ttl"):
        assert Fields({key: "2h"}).duration("LeafCertTTL", 0) == 7200


def test_exact_reading_knows_one_spelling():
    fields = Fields({"ca_provider": "x", "CAProvider": "y"}, where="connect", exact=True)

    assert fields.text("ca_provider") == "x"
    fields.finish()
    assert [str(fault) for fault in fields.faults] == ['connect.CAProvider: unknown key; did you mean "ca_provider"?']


def test_weak_types_are_understood():
    fields = Fields(
        {
            "a": "384",
            "b": "1.5e1",
            "c": 3_600_000_000_000,
            "d": "TRUE",
            "e": 2.0,
            "f": "one",
            "g": ["x", "y"],
            "h": {"k": 1},
        }
    )

    assert fields.integer("a", 0) == 384
    assert fields.number("b", 0) == 15
    assert fields.duration("c", 0) == 3600
    assert fields.flag("d") is True
    assert fields.integer("e", 0) == 2
    assert fields.texts("f") == ("one",)
    assert fields.texts("g") == ("x", "y")
    assert fields.mapping("h") == {"k": 1}
    fields.finish()
    assert fields.faults == []


def test_absent_and_null_mean_the_default():
    fields = Fields({"a": None})

    assert (fields.integer("a", 7), fields.text("b"), fields.flag("a", default=True)) == (7, None, True)
    assert (fields.duration("a", 1.0), fields.number("a", 2.0), fields.secret("a")) == (1.0, 2.0, None)
    assert (fields.texts("a"), fields.mapping("a"), fields.has("a"), fields.spelling("a")) == ((), {}, False, "a")


def test_every_fault_is_noted_and_reading_goes_on():
    fields = Fields(
        {
            "leaf_cert_ttl": "1d",
            "Bits": "x",
            "Rate": -1,
            "Mode": "fast",
            "On": "maybe",
            "Key": 5,
            "Names": [1],
            "Block": "no",
            "Half": 1.5,
            "Huge": 10**400,
            "Low": "1s",
            "High": "9h",
            "Text": [],
            "Mistake": 1,
        },
        where="Config",
    )
    fields.duration("LeafCertTTL", 0)
    fields.integer("Bits", 0)
    fields.number("Rate", 0, low=0)
    fields.text("Mode", one_of=("slow", "slower"))
    fields.flag("On")
    fields.secret("Key")
    fields.texts("Names")
    fields.mapping("Block")
    fields.integer("Half", 0)
    fields.number("Huge", 0)
    fields.duration("Low", 0, low=60)
    fields.duration("High", 0, high=3600)
    fields.text("Text")
    fields.integer("Mistakes", 0)
    fields.finish()

    assert [str(fault) for fault in fields.faults] == [
        'Config.leaf_cert_ttl: time: unknown unit "d" in duration "1d"; use hours, minutes and seconds, such as "72h" or "1h30m"',
        'Config.Bits: "x" is not a number; give a number',
        "Config.Rate: -1 is too small; use at least 0",
        'Config.Mode: "fast" is not known; use "slow" or "slower"',
        "Config.On: expected bool, got string; use true or false",
        "Config.Key: expected string, got float64; write it in quotes",
        "Config.Names: expected []string, got []interface {}; give a list of strings",
        "Config.Block: expected map, got string; give an object { ... }",
        "Config.Half: 1.5 is not a whole number; leave the fraction out",
        "Config.Huge: expected float, got float64; give a number",
        "Config.Low: 1s is too short; use at least 1m0s",
        "Config.High: 9h0m0s is too long; use at most 1h0m0s",
        'Config.Text: expected string, got []interface {}; write it in quotes, Text = "..."',
        'Config.Mistake: unknown key; did you mean "Mistakes"?',
    ]


def test_one_key_in_two_spellings_is_a_fault():
    fields = Fields({"PrivateKey": "one", "private_key": "two"})

    assert [str(fault) for fault in fields.faults] == [
        'private_key: the same key is given as "PrivateKey" too; give it once'
    ]


@given(
    st.dictionaries(
        st.text(max_size=4),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(),
            st.text(max_size=5),
            st.lists(st.integers(), max_size=1),
        ),
    )
)
def test_no_value_makes_a_reader_raise(given_mapping: dict[str, object]):
    fields = Fields(given_mapping)
    for key in given_mapping:
        fields.integer(key, 0, low=0, high=5)
        fields.number(key, 0)
        fields.duration(key, 0, low=0, high=5)
        fields.flag(key)
        fields.text(key)
        fields.texts(key)
        fields.secret(key)
        fields.mapping(key)
    fields.finish()


def test_fault_text_puts_the_first_heading_on_top():
    faults = [Fault("a", "is wrong", "do better", "Consul says no"), Fault("b", "too", heading="unheard")]

    assert fault_text(faults) == "Consul says no\na: is wrong; do better\nb: too"
    assert fault_text(faults[1:]) == "unheard\nb: too"
    assert fault_text([]) == ""


def test_nearest_key():
    assert nearest("leaf_ttl", ["LeafCertTTL", "RootCert"]) == "LeafCertTTL"
    assert nearest("zzz", ["LeafCertTTL"]) is None
