from __future__ import annotations

import json

from caserver.raft.ports import KeyReport
from caserver.state.sealing import sealed_values
from tests.contract.world import running

KEYRING = "/v1/operator/keyring"


async def test_the_keyring_shows_ids_of_keys_and_what_each_is_needed_for() -> None:
    async with running() as world:
        (sealing,) = {value[:8].hex() for value in sealed_values(world.log.state).values()}
        world.log.keys = {"n1": KeyReport((sealing, "aa"), (sealing,))}

        answered = await world.fetch("GET", KEYRING)

    document = json.loads(answered.text)
    assert answered.status == 200
    assert document["Nodes"] == [{"Node": "n1", "Announced": True, "Keys": [sealing, "aa"], "Stored": [sealing]}]
    current, former = document["Keys"]
    assert (current["ID"], current["Removable"], "hmac" in current["Seals"]) == (sealing, False, True)
    assert former == {"ID": "aa", "Seals": [], "Removable": True, "NeededBecause": []}


async def test_a_follower_shows_the_keyring_as_fresh_as_the_leader_knows_it() -> None:
    async with running(node="n2", leader="n1") as world:
        before = world.hop.sent
        answered = await world.fetch("GET", KEYRING)
        stale = await world.fetch("GET", f"{KEYRING}?stale")

    assert world.hop.sent == before + 1
    assert [(node["Node"], node["Announced"]) for node in json.loads(answered.text)["Nodes"]] == [
        ("n1", False),
        ("n2", False),
    ]
    assert json.loads(stale.text) == json.loads(answered.text)


async def test_while_the_clock_is_not_trusted_callers_are_told_why() -> None:
    async with running() as world:
        assert (await world.fetch("GET", "/v1/agent/connect/ca/leaf/web")).status == 200
        world.clock.set_wall(-3600)

        refused = await world.fetch("GET", "/v1/agent/connect/ca/leaf/db")
        cached = await world.fetch("GET", "/v1/agent/connect/ca/leaf/web")
        roots = await world.fetch("GET", "/v1/connect/ca/roots")
        body = json.dumps({"Provider": "consul", "Config": {"LeafCertTTL": "48h"}}).encode()
        change = await world.fetch("PUT", "/v1/connect/ca/configuration", body=body)

    assert [refused.status, change.status] == [503, 503]
    assert "the wall clock of n1 jumped by -3600 s: set it right" in refused.text
    assert [cached.status, roots.status] == [200, 200]
