"""Completion: what the table of verbs and flags lets follow, and the scripts in the shells that are there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caserver.cli import VERBS, main
from caserver.cli.completion import candidates


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("conn", ["connect"]),
        ("connect ", ["ca"]),
        ("connect ca ", ["cleanup", "get-config", "leaf", "roots", "set-config", "sign"]),
        ("connect ca s", ["set-config", "sign"]),
        ("snapshot r", ["restore"]),
        ("snapshot save -st", ["-stale"]),
        ("snapshot save --st", ["--stale"]),
        ("snapshot save -token", ["-token-file=", "-token="]),
        ("snapshot save ", []),
        ("snapshot save -token ", []),
        ("snapshot save -token -", []),
        ("snapshot save -stale -http-a", ["-http-addr="]),
        ("completion ", ["bash", "fish", "zsh"]),
        ("nope ", []),
        ("version x -", ["-h"]),
    ],
)
def test_what_may_follow(line: str, expected: list[str]) -> None:
    assert candidates(line.split(" ")) == expected


def test_the_first_words_are_all_there() -> None:
    assert candidates([""]) == sorted({verb.split()[0] for verb in VERBS})
    assert candidates([]) == candidates([""])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_reached_word_by_word(verb: str) -> None:
    words = verb.split()
    for place, word in enumerate(words):
        assert word in candidates([*words[:place], ""])
    assert "-h" in candidates([*words, "-"])


def test_the_words_are_asked_for_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "words", "--", "snapshot", "s"], {}) == 0
    assert capsys.readouterr().out == "save\n"


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_one_shell_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words], {}) == 1
    assert "name one shell: bash, zsh, fish" in capsys.readouterr().err


def run(shell: str, script: str, tmp_path: Path) -> str:
    """Run a script in a shell that finds this caserver."""
    program = tmp_path / "caserver"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m caserver "$@"\n')
    program.chmod(0o755)
    (tmp_path / "backup.snap").touch()
    root = Path(__file__).parents[2]
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "HOME": str(tmp_path),
        "TERM": "dumb",
    }
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=False, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def completed_by_bash(tmp_path: Path, *words: str) -> list[str]:
    listed = " ".join(f"'{word}'" for word in ("caserver", *words))
    script = (
        'eval "$(caserver completion bash)"\n'
        f"COMP_WORDS=({listed}) COMP_CWORD={len(words)}\n_caserver\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return run("bash", script, tmp_path).split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("snapshot", ""), ["inspect", "restore", "save"]),
        (("snapshot", "save", "-tok"), ["-token-file=", "-token="]),
        (("snapshot", "save", "ba"), ["backup.snap"]),
        (("snapshot", "save", "-token", ""), ["backup.snap", "caserver"]),
    ],
)
def test_bash_completes(tmp_path: Path, words: tuple[str, ...], expected: list[str]) -> None:
    assert sorted(completed_by_bash(tmp_path, *words)) == sorted(expected)


FISH = """
caserver completion fish | source
complete -C "caserver snapshot s"
complete -C "caserver snapshot save ba"
"""
ZSH = """
autoload -Uz compinit && compinit -u -d dump
source <(caserver completion zsh)
compadd() { while [ "$1" != -- ]; do shift; done; shift; print -l -- "$@" }
_files() { print backup.snap }
words=(caserver snapshot s) CURRENT=3; _caserver
words=(caserver snapshot save ba) CURRENT=4; _caserver
"""


@pytest.mark.parametrize(("shell", "script"), [("zsh", ZSH), ("fish", FISH)])
def test_other_shells_complete(tmp_path: Path, shell: str, script: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed on this machine")

    assert run(shell, script, tmp_path).split() == ["save", "backup.snap"]
