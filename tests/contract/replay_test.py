"""Replays the recordings of a real Consul 1.8.7 against a node in this process.

Compared are the status, the set and the values of the headers, the text of errors, and of JSON the layout, the names, their
order and the types of the values. Values that are a cluster's own (indexes, ids, certificates) are compared by type.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from caserver.pki.spiffe import cluster_id_of_root
from tests.contract.differences import DIFFERENCES, Difference, difference
from tests.contract.world import CLUSTER_ID, Answered, World, running

DATA = Path(__file__).parent / "data"
RECORDINGS: dict[str, dict[str, Any]] = {
    recording["name"]: recording
    for path in sorted(DATA.glob("*.jsonl"))
    for recording in map(json.loads, path.read_text().splitlines())
}
NEVER_COMPARED = {"Date", "Connection"}
OWN_VALUES = {"X-Consul-Index", "Age", "Content-Length", "X-Consul-Lastcontact"}
VIRTUAL_SECONDS = 12.0  # enough for every wait of the recordings


def setting(recording: dict[str, Any]) -> dict[str, Any]:
    """How to run the node that a recording was taken from."""
    name = recording["name"]
    if name.startswith("c06"):
        return {"dev": False, "node": "n2" if "-leader-" in name else "n1", "leader": "n2"}
    if name.startswith("c05"):
        return {"dev": False, "enabled": "enabled-later" in name}
    before = SENT_BEFORE.get(name, "")
    limits = {"CSRMaxPerSecond": 1} if "rate-limited" in name else {}
    cluster_id = CLUSTER_ID if "wrongtd" in name else operators_cluster(before or recording["request"]["body"])
    return {"dev": True, "cluster_id": cluster_id, "config": limits}


def operators_cluster(body: str) -> str:
    """The cluster that the root in a PUT was made for, else ours."""
    try:
        config = json.loads(body)["Config"]
        return cluster_id_of_root(config.get("RootCert") or config["root_cert"]) or CLUSTER_ID
    except (ValueError, KeyError, TypeError, AttributeError):
        return CLUSTER_ID


def _without_ttl(body: str) -> str:
    document = json.loads(body)
    del document["Config"]["LeafCertTTL"]
    return json.dumps(document)


_TTL_ONLY = RECORDINGS["c02-put-ttl-only"]["request"]["body"]
# Configurations that were in force when a recording was taken.
SENT_BEFORE = {
    "c02-after-good-ec-roots": _without_ttl(_TTL_ONLY),
    "c02-after-same-again-config": _without_ttl(_TTL_ONLY),
    "c02-after-same-again-roots": _without_ttl(_TTL_ONLY),
    "c02-after-ttl-only-config": _TTL_ONLY,
    "c02-after-ttl-only-roots": _TTL_ONLY,
    "c02-after-good-rsa-roots": RECORDINGS["c02-put-good-rsa"]["request"]["body"],
    "c06-noquorum-config-stale": '{"Provider":"consul","Config":{"LeafCertTTL":"47h"}}',
}


async def prepared(world: World, recording: dict[str, Any]) -> tuple[str, bytes]:
    """Bring the node into the state of the recording; path and body, with indexes of ours in place of the recorded ones."""
    name, path, body = recording["name"], recording["request"]["path"], recording["request"]["body"]
    if before := SENT_BEFORE.get(name):
        assert (await world.fetch("PUT", "/v1/connect/ca/configuration", body=before.encode())).status == 200
    if "rate-limited" in name:
        await world.fetch("GET", "/v1/agent/connect/ca/leaf/another")
    if "right-modifyindex" in name:
        index = world.log.state.configuration.modify_index if world.log.state.configuration else 0
        body = body.replace('"ModifyIndex": 5', f'"ModifyIndex": {index}')
    path = await primed_path(world, recording, path)
    if "noquorum" in name:
        world.log.step_down()
    return path, body.encode()


async def primed_path(world: World, recording: dict[str, Any], path: str) -> str:
    """Fetch once what the recording found in a cache, and put our index for the recorded one."""
    headers = dict(recording["response"]["headers"])
    asked = re.search(r"index=(\d+)", path)
    recorded = headers.get("X-Consul-Index")
    blocking = asked is not None and recorded is not None and asked[1] != "0"
    if headers.get("X-Cache") != "HIT" and not blocking:
        return path
    first = await world.fetch("GET", path.partition("?")[0])
    if asked is None or recorded is None or not blocking:
        return path
    index = int(first.headers["X-Consul-Index"]) + int(asked[1]) - int(recorded)
    return path.replace(asked[0], f"index={max(1, index)}")


def assert_same_headers(recording: dict[str, Any], answered: Answered, expected: Difference | None) -> None:
    if expected is not None and not expected.headers:
        return
    recorded = {name: value for name, value in recording["response"]["headers"] if name not in NEVER_COMPARED}
    if recorded.pop("Transfer-Encoding", None):  # Go switches to chunks above 2 KiB
        recorded["Content-Length"] = "0"
    if "X-Consul-Knownleader" in recorded:  # Consul says false even on the leader
        recorded["X-Consul-Knownleader"] = "false" if "noquorum" in recording["name"] else "true"
    found = {name: value for name, value in answered.headers.items() if name not in NEVER_COMPARED}
    if expected is not None and expected.status != recording["response"]["status"]:
        for name in ("Content-Type", "X-Cache", "Age", "Content-Encoding", "Retry-After"):
            recorded.pop(name, None)
            found.pop(name, None)
    found.pop("Retry-After", None)  # ours on 429

    assert set(found) == set(recorded)
    for name, value in recorded.items():
        if name in OWN_VALUES:
            assert re.fullmatch(r"\d+", found[name])
        else:
            assert (name, found[name]) == (name, value)
    if recording["request"]["method"] != "HEAD":
        assert int(found["Content-Length"]) == len(answered.body)


def assert_same_shape(expected: Any, found: Any, where: str = "$") -> None:
    """The same names in the same order with values of the same types."""
    if expected is None or found is None:
        assert found is None or where.endswith(".IntermediateCerts"), where
        return
    assert _json_type(found) is _json_type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same_shape(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list) and expected and found:
        assert_same_shape(expected[0], found[0], f"{where}[0]")


def _json_type(value: Any) -> type:
    return float if type(value) is int else type(value)


def assert_same_body(recording: dict[str, Any], answered: Answered, expected: Difference | None) -> None:
    text = str(recording["response"]["body"])
    if expected is not None:
        wanted = text if expected.text is None else expected.text
        assert answered.text.startswith(wanted)
        return
    if dict(recording["response"]["headers"]).get("Content-Type") != "application/json":
        # Consul tells the first fault only; what is wrong besides, and what to do, follows on further lines.
        assert answered.text == text or (answered.status >= 400 and answered.text.startswith(text + "\n"))
        return
    wanted, found = json.loads(text), json.loads(answered.text)
    assert_same_shape(wanted, found)
    indented = text.endswith("\n")
    assert answered.text == (
        json.dumps(found, indent=4, ensure_ascii=False) + "\n"
        if indented
        else json.dumps(found, separators=(",", ":"), ensure_ascii=False)
    ).replace("<", "\\u003c").replace(">", "\\u003e")


@pytest.mark.parametrize("name", sorted(RECORDINGS))
async def test_a_recorded_request_is_answered_as_consul_answered_it(name: str) -> None:
    recording, expected = RECORDINGS[name], difference(name)
    request, response = recording["request"], recording["response"]
    headers = {key: value for key, value in request["headers"] if key not in {"Host", "Content-Length"}}
    async with running(**setting(recording)) as world:
        path, body = await prepared(world, recording)
        started = world.clock.monotonic()
        advance = VIRTUAL_SECONDS if response["elapsed_s"] >= 1 or "noquorum" in name else 0.0
        answered = await world.fetch(request["method"], path, headers, body, advance=advance)
        waited = world.clock.monotonic() - started

    assert answered.status == (response["status"] if expected is None else expected.status), answered.text
    assert_same_headers(recording, answered, expected)
    assert_same_body(recording, answered, expected)
    if "wait=2s" in path and response["elapsed_s"] >= 1:
        assert 2.0 <= waited <= 3.0


def test_every_difference_is_in_use() -> None:
    used = {difference(name) for name in RECORDINGS}

    assert set(DIFFERENCES) <= used
