"""Replays the recordings of a real Consul 1.8.7 against a node in this process.

Compared are the status, the set and the values of the headers, the text of errors, and of JSON the layout, the names, their
order and the types of the values. Values that are a cluster's own (indexes, ids, certificates) are compared by type.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from caserver.pki.spiffe import cluster_id_of_root
from tests.contract.acl_recordings import grant
from tests.contract.differences import Difference, difference
from tests.contract.recordings import REQUESTS, in_scope
from tests.contract.world import CLUSTER_ID, Answered, World, running
from tests.testkit.acl_world import ON
from tests.testkit.keys import key_pem

CONFIGURATION = "/v1/connect/ca/configuration"
NEVER_COMPARED = {"Date", "Connection"}
OWN_VALUES = {"X-Consul-Index", "Age", "Content-Length", "X-Consul-Lastcontact"}
VIRTUAL_SECONDS = 12.0  # enough for every wait of the recordings


def setting(recording: dict[str, Any]) -> dict[str, Any]:
    """How to run the node that a recording was taken from."""
    name = recording["name"]
    if name.startswith("c06"):
        return {"dev": False, "node": "n2" if "-leader-" in name else "n1", "leader": "n2"}
    if name.startswith(("c05-disabled", "c05-enabled", "c05-redisabled")):
        return {"dev": False, "enabled": "enabled-later" in name}
    if name.startswith("c07"):
        return {"acl": ON}
    before = SENT_BEFORE.get(name) or REFUSED_BEFORE.get(name)
    cluster_id = CLUSTER_ID if "wrongtd" in name else operators_cluster(before or recording["request"]["body"])
    return {"dev": not name.startswith("c05-restart"), "cluster_id": cluster_id, "config": started_with(name)}


def started_with(name: str) -> dict[str, object]:
    """The ca_config of the node's own file."""
    if key := re.match(r"c03-boot-(ec|rsa)(\d+)", name):
        return {"PrivateKeyType": key[1], "PrivateKeyBits": int(key[2])}
    if "new-caconfig" in name:
        return {"LeafCertTTL": "10h"}
    return {"CSRMaxPerSecond": 1} if "rate-limited" in name else {}


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


def _sent(name: str) -> str:
    return str(REQUESTS[name]["request"]["body"])


_TTL_ONLY = _sent("c02-put-ttl-only")


def _mismatched(body: str) -> str:
    document = json.loads(body)
    document["Config"]["PrivateKey"] = key_pem("ec-256")
    return json.dumps(document)


def _leaf_as_root(name: str) -> str:
    leaf = json.loads(REQUESTS[name]["response"]["body"])
    return json.dumps(
        {"Provider": "consul", "Config": {"PrivateKey": leaf["PrivateKeyPEM"], "RootCert": leaf["CertPEM"]}}
    )


# Configurations that were in force when a recording was taken.
SENT_BEFORE = {
    "c02-after-good-ec-roots": _without_ttl(_TTL_ONLY),
    "c02-after-same-again-config": _without_ttl(_TTL_ONLY),
    "c02-after-same-again-roots": _without_ttl(_TTL_ONLY),
    "c02-after-ttl-only-config": _TTL_ONLY,
    "c02-after-ttl-only-roots": _TTL_ONLY,
    "c02-after-good-rsa-roots": _sent("c02-put-good-rsa"),
    "c02-clean-key-only-leaf": json.dumps({"Provider": "consul", "Config": {"PrivateKey": key_pem("ec-256")}}),
    "c02-clean-key-only-roots": json.dumps({"Provider": "consul", "Config": {"PrivateKey": key_pem("ec-256")}}),
    "c02-clean-rsa-key-only-leaf": _sent("c02-clean-rsa-key-only"),
    "c02-leaf-after-force": _sent("c02-cfg-recover-force"),
    "c02-leaf-after-good": _without_ttl(_TTL_ONLY),
    "c02-leaf-after-rsa": _sent("c02-put-good-rsa"),
    "c02-leaf-web-just-after-rotation": _without_ttl(_TTL_ONLY),
    "c06-noquorum-config-stale": '{"Provider":"consul","Config":{"LeafCertTTL":"47h"}}',
}

# What Consul took, to the harm of its leaves, and what is refused here.
REFUSED_BEFORE = {
    "c02-clean-cert-in-key-leaf": _sent("c02-clean-cert-in-key"),
    "c02-clean-garbage-key-only-leaf": _sent("c02-clean-garbage-key-only"),
    "c02-clean-garbage-key-only-roots": _sent("c02-clean-garbage-key-only"),
    "c02-leaf-after-expired": _sent("c02-cfg-expired-fresh"),
    "c02-leaf-after-mismatch": _mismatched(_TTL_ONLY),
    "c02-leaf-after-nonca": _leaf_as_root("c01-agent-leaf-web-1st"),
    "c05-restart-after-garbage-key-roots": _sent("c02-cfg-garbage-key-fresh"),
    "c05-restart-after-mismatch-leaf": _mismatched(_TTL_ONLY),
    "c05-restart-after-mismatch-roots": _mismatched(_TTL_ONLY),
}


async def prepared(world: World, recording: dict[str, Any]) -> tuple[str, bytes]:
    """Bring the node into the state of the recording; path and body, with indexes of ours in place of the recorded ones."""
    name, path, body = recording["name"], recording["request"]["path"], recording["request"]["body"]
    if "just-after-rotation" in name:
        await world.fetch("GET", path)
    if before := SENT_BEFORE.get(name):
        assert (await world.fetch("PUT", CONFIGURATION, body=before.encode())).status == 200
    if refused := REFUSED_BEFORE.get(name):
        assert (await world.fetch("PUT", CONFIGURATION, body=refused.encode())).status == 400
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
    if (headers.get("X-Cache") != "HIT" and not blocking) or "just-after-rotation" in recording["name"]:
        return path
    if recording["name"].startswith("c07"):
        return path  # done with the token that it takes
    first = await world.fetch("GET", path.partition("?")[0])
    if asked is None or recorded is None or not blocking:
        return path
    index = int(first.headers["X-Consul-Index"]) + int(asked[1]) - int(recorded)
    return path.replace(asked[0], f"index={max(1, index)}")


def assert_same_headers(recording: dict[str, Any], answered: Answered, expected: Difference | None) -> None:
    if expected is not None and not expected.headers:
        return
    recorded = {name: value for name, value in recording["response"]["headers"] if name not in NEVER_COMPARED}
    streamed = answered.headers.get("Transfer-Encoding") == "chunked"
    if not streamed and recorded.pop("Transfer-Encoding", None):  # Go switches to chunks above 2 KiB
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
    if recording["request"]["method"] != "HEAD" and not streamed:
        assert int(found["Content-Length"]) == len(answered.body)


# Where an agent that describes itself leaves out what only Consul has: gossip, DNS, checks, its runtime.
CONSULS_OWN = ("$.DebugConfig", "$.Member.Tags", "$.Stats")


def assert_same_shape(expected: Any, found: Any, where: str = "$") -> None:
    """The same names in the same order with values of the same types."""
    if expected is None or found is None:
        assert found is None or where.endswith(".IntermediateCerts"), where
        return
    assert _json_type(found) is _json_type(expected), where
    if isinstance(expected, dict):
        names = [name for name in expected if name in found or not where.startswith(CONSULS_OWN)]
        assert list(found) == names, where
        for key in names:
            assert_same_shape(expected[key], found[key], f"{where}.{key}")
    elif isinstance(expected, list) and expected and found:
        assert_same_shape(expected[0], found[0], f"{where}[0]")


def _json_type(value: Any) -> type:
    return float if type(value) is int else type(value)


def assert_same_body(recording: dict[str, Any], answered: Answered, expected: Difference | None) -> None:
    if answered.headers.get("Content-Type") == "application/x-gzip":
        return  # an archive, of which the headers were compared
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


@pytest.mark.parametrize("name", in_scope(REQUESTS))
async def test_a_recorded_request_is_answered_as_consul_answered_it(name: str) -> None:
    recording, expected = REQUESTS[name], difference(name)
    request, response = recording["request"], recording["response"]
    headers = {key: value for key, value in request["headers"] if key not in {"Host", "Content-Length"}}
    async with running(**setting(recording)) as world:
        if name.startswith("c07"):
            await grant(world, recording)
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
