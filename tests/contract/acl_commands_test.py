"""The recorded commands against a node that asks for tokens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from caserver.cli import main
from tests.contract.recordings import COMMANDS
from tests.testkit.acl_world import guarded

NAMES = sorted(name for name in COMMANDS if "-acl-" in name)


@pytest.mark.parametrize("name", NAMES)
async def test_a_recorded_command_is_let_in_or_turned_away_as_it_was(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = COMMANDS[name]
    (tmp_path / "ttl.json").write_text(json.dumps({"Provider": "consul", "Config": {"LeafCertTTL": "40h"}}))
    async with guarded() as world:
        host, port = world.server.addresses[0]
        words = [
            word.replace("127.0.0.1:18590", f"{host}:{port}").replace("=ttl.json", f"={tmp_path / 'ttl.json'}")
            for word in recording["command"].split()
        ]
        capsys.readouterr()  # what the node logged
        code = await asyncio.to_thread(main, words, recording["env"])
    printed = capsys.readouterr()

    assert (code, printed.err) == (recording["exit_code"], recording["stderr"])
    if recording["stdout"]:
        found, wanted = json.loads(printed.out), json.loads(recording["stdout"])
        for index in ("CreateIndex", "ModifyIndex"):
            assert found.pop(index) > 0
            wanted.pop(index)
        assert found == wanted


def test_there_are_such_commands() -> None:
    assert len(NAMES) == 3
