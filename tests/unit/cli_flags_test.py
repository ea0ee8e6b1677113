from __future__ import annotations

from pathlib import Path

import pytest

from caserver.cli.flags import Flag, Takes, UsageError, client, parse, query
from caserver.client import ClientError

FLAGS = (
    Flag("config-file", "", takes=Takes.VALUES),
    Flag("config-dir", "", takes=Takes.VALUES, list_of="config-file"),
    Flag("token", ""),
    Flag("http-addr", ""),
    Flag("token-file", ""),
    Flag("ca-file", ""),
    Flag("datacenter", ""),
    Flag("stale", "", takes=Takes.NOTHING),
)


@pytest.mark.parametrize("words", [["-token=x"], ["--token=x"], ["-token", "x"], ["--token", "x"]])
def test_every_spelling_of_a_flag_counts(words: list[str]) -> None:
    assert parse(words, FLAGS).values == {"token": "x"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-stale"], True),
        (["--stale"], True),
        (["-stale=true"], True),
        (["-stale=1"], True),
        (["-stale=false"], False),
        (["-stale", "-stale=0"], False),
        ([], False),
    ],
)
def test_a_switch_needs_no_value(words: list[str], expected: bool) -> None:
    assert parse(words, FLAGS).switch("stale") is expected


def test_a_switch_does_not_swallow_the_next_word() -> None:
    parsed = parse(["-stale", "web"], FLAGS)

    assert (parsed.switch("stale"), parsed.arguments) == (True, ["web"])


def test_values_may_begin_with_a_dash_or_hold_an_equals_sign() -> None:
    assert parse(["-token", "-1", "-http-addr=a=b"], FLAGS).values == {"token": "-1", "http-addr": "a=b"}


def test_the_last_value_wins_and_lists_grow() -> None:
    parsed = parse(["-token=a", "-token=b", "-config-file=a", "-config-file", "b"], FLAGS)

    assert parsed.values == {"token": "b"}
    assert parsed.lists == {"config-file": ["a", "b"]}


def test_lists_of_one_kind_keep_their_order() -> None:
    parsed = parse(["-config-file=a", "-config-dir=b", "-config-file=c"], FLAGS)

    assert parsed.lists == {"config-file": ["a", "b", "c"]}


def test_arguments_may_stand_between_flags_and_end_with_two_dashes() -> None:
    parsed = parse(["one", "-token=x", "two", "-", "--", "-stale"], FLAGS)

    assert parsed.arguments == ["one", "two", "-", "-stale"]


@pytest.mark.parametrize("word", ["-h", "--help", "-help"])
def test_help_is_understood_anywhere(word: str) -> None:
    assert parse(["-token=x", word], FLAGS).help_wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-nope"], "flag provided but not defined: -nope"),
        (["-tokn=x"], "flag provided but not defined: -tokn (did you mean -token?)"),
        (["-token"], "flag needs an argument: -token"),
        (["-stale=maybe"], 'invalid boolean value "maybe" for -stale: parse error'),
    ],
)
def test_what_is_wrong_is_said_as_go_says_it(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words, FLAGS)

    assert str(caught.value) == message


def test_query_options_come_from_flags() -> None:
    assert query(parse(["-datacenter=dc2", "-stale"], FLAGS)) == {"dc": "dc2", "stale": ""}
    assert query(parse([], FLAGS)) == {}


def test_a_token_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Error loading token file"):
        client(parse([f"-token-file={tmp_path / 'none'}"], FLAGS), {})


def test_the_environment_names_the_address_and_a_flag_overrules_it() -> None:
    with pytest.raises(ClientError, match='"ftp://consul"'):
        client(parse([], FLAGS), {"CONSUL_HTTP_ADDR": "ftp://consul"})
    with pytest.raises(ClientError, match='"ftp://ours"'):
        client(parse([], FLAGS), {"CONSUL_HTTP_ADDR": "ftp://consul", "CASERVER_HTTP_ADDR": "ftp://ours"})
    with pytest.raises(ClientError, match='"ftp://flag"'):
        client(parse(["-http-addr=ftp://flag"], FLAGS), {"CASERVER_HTTP_ADDR": "ftp://ours"})
