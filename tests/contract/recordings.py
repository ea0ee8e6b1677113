"""The recordings of a real Consul 1.8.7, by kind: requests, configuration files, commands, and longer runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
Recording = dict[str, Any]


def _load(*patterns: str) -> dict[str, Recording]:
    paths = sorted({path for pattern in patterns for path in DATA.glob(pattern)})
    return {each["name"]: each for path in paths for each in map(json.loads, path.read_text().splitlines())}


REQUESTS = _load("c0?.jsonl")
FILES = _load("files.jsonl")
COMMANDS = _load("commands.jsonl")
RUNS = _load("runs.jsonl")

# What is not replayed: patterns of names -> why.
OUT_OF_SCOPE: Mapping[str, str] = {
    "c08-*-acl-*": "are replayed in tests/contract/acl_commands_test.py, against a node that asks for tokens",
    "c08-snapshot-*": "are replayed in tests/contract/cli_snapshot_test.py, whose server sends archives",
    "c08-connect-envoy-bootstrap": "runs a local agent's service catalog, which is no part of a certificate authority",
    "c08-connect-proxy-register": "registers a service, which is no part of a certificate authority",
    "c04-config-after-prune": "shows a configuration that is refused here (SkipValidate), as does the next",
    "c05-restart-after-garbage-key-config": "shows a configuration whose key cannot be read",
    "c08-connect-proxy": "Consul's built-in proxy; what it asks of the server is among the recorded requests",
    "c08-connect-expose-none": "Consul's built-in proxy, which asks the server nothing here",
}


def out_of_scope(name: str) -> str | None:
    """Why a recording is not replayed; None if it is."""
    return next((reason for pattern, reason in OUT_OF_SCOPE.items() if fnmatchcase(name, pattern)), None)


def in_scope(recordings: Mapping[str, Recording]) -> list[str]:
    """The names to replay, sorted."""
    return sorted(name for name in recordings if out_of_scope(name) is None)
