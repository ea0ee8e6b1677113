from __future__ import annotations

import pytest

from caserver.cli import GROUPS, VERBS, main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"], {}) == 0
    assert capsys.readouterr().out.startswith("caserver v")


@pytest.mark.parametrize("word", ["-v", "-version", "--version"])
def test_version_by_flag(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word], {}) == 0
    assert capsys.readouterr().out.startswith("caserver v")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "-h"], {}) == 0

    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: caserver {verb}")
    assert f"Example:\n\n      $ caserver {verb}" in out
    assert err == ""


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_lists_its_verbs(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*group.split(), "-h"], {}) == 0

    out = capsys.readouterr().out
    inside = [verb.removeprefix(group).strip() for verb in VERBS if verb.startswith(group)]
    assert inside
    assert all(f"    {verb} " in out for verb in inside)


@pytest.mark.parametrize(
    ("words", "code"), [([], 127), (["frob"], 127), (["connect", "ca"], 1), (["connect", "ca", "frob"], 1)]
)
def test_what_is_no_command_gets_the_list_and_consuls_exit_code(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words, {}) == code

    out, err = capsys.readouterr()
    assert (out, err[:6]) == ("", "Usage:")


def test_an_unknown_flag_is_reported_first_and_last(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connect", "ca", "get-config", "-nope"], {}) == 1

    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "flag provided but not defined: -nope"
    assert lines[-1] == "Failed to parse args: flag provided but not defined: -nope"
