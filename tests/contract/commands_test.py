"""Replays the recorded commands: the same words lead to the same requests, output and exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from caserver.cli import main
from tests.contract.differences import COMMAND_DIFFERENCES
from tests.contract.recordings import COMMANDS, Recording, in_scope
from tests.testkit.scripted import Scripted, scripted_server

# The files that the recorded commands read, where their content is not the body that was sent.
FILES = {
    "badjson.json": "{",
    "extra.json": '{"Provider": "consul", "Config": {}, "Extra": 1}',
}


SERVERS = {
    "Servers": [
        {
            "ID": "634a6034-b543-aa4e-c463-b0a374985552",
            "Node": "cli",
            "Address": "127.0.0.1:18581",
            "Leader": True,
            "ProtocolVersion": "3",
            "Voter": True,
        }
    ],
    "Index": 0,
}


def answer(script: Scripted, recording: Recording) -> None:
    """Answer as the recorded server did, as far as the recorded output tells."""
    status = recording["statuses"][0] if recording["statuses"] else 200
    error = recording["stderr"].partition(f"{status} (")[2].rpartition(")")[0]
    script.answers(error if status >= 400 else recording["stdout"] or "", status)
    if recording["stdout"].startswith("Configuration updated"):
        script.answers("")
    if "list-peers" in recording["name"]:
        script.answers(json.dumps(SERVERS))


def words_of(recording: Recording, address: str, directory: Path) -> list[str]:
    """The recorded words, with our server and our files in them."""
    found = []
    for word in recording["command"].split():
        if word.startswith("-http-addr=") and "refused" not in recording["name"]:
            found.append(f"-http-addr={address}")
        elif word.startswith("-config-file=") and word != "-config-file=-":
            name = word.partition("=")[2]
            sent = recording["requests"][0][1] if recording["requests"] else "{}"
            (directory / name).write_text(FILES.get(name, sent))
            found.append(f"-config-file={directory / name}")
        else:
            found.append(word)
    return found


@pytest.mark.parametrize("name", in_scope(COMMANDS))
def test_a_recorded_command_does_what_it_did(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording, expected = COMMANDS[name], COMMAND_DIFFERENCES.get(name)
    with scripted_server() as script:
        answer(script, recording)
        code = main(words_of(recording, script.address, tmp_path), recording["env"])
    printed = capsys.readouterr()

    assert code == recording["exit_code"]
    assert [f"{each.method} {each.target} HTTP/1.1" for each in script.asked] == [
        lines[0] for lines, _ in recording["requests"]
    ]
    for each, (_, body) in zip(script.asked, recording["requests"], strict=True):
        assert (json.loads(each.body) if each.body else "") == (json.loads(body) if body else "")
    if expected is None:
        assert printed.out == recording["stdout"]
        assert printed.err.splitlines()[:1] == recording["stderr"].splitlines()[:1]
    else:
        assert expected in printed.out + printed.err
