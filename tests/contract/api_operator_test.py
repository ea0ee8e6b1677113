import json
from dataclasses import replace
from typing import Any

import pytest

from caserver.raft.status import PeerStatus
from tests.contract.world import World, running

CONFIGURATION = "/v1/operator/raft/configuration"
TRANSFER = "/v1/operator/raft/transfer-leader"
HEALTH = "/v1/operator/autopilot/health"
AUTOPILOT = "/v1/operator/autopilot/configuration"
METRICS = "/v1/agent/metrics"
LEARNER = PeerStatus(connected=True, voter=False, last_contact=0.01, steady_for=1.0, last_index=3, last_term=1)
GONE = PeerStatus(connected=False, voter=True, last_contact=None, steady_for=1.0, last_index=0, last_term=0)


async def read(world: World, path: str) -> Any:
    answered = await world.fetch("GET", path)
    assert answered.status == 200, answered.text
    return json.loads(answered.text)


@pytest.mark.parametrize("node", ["n1", "n2"])
async def test_who_votes_is_what_the_leader_says(node: str) -> None:
    async with running(dev=False, node=node, leader="n2") as world:
        world.rafts["n2"].unwell = {"n3": LEARNER}
        servers = (await read(world, CONFIGURATION))["Servers"]
        consistent = (await read(world, f"{CONFIGURATION}?consistent"))["Servers"]
        stale = (await read(world, f"{CONFIGURATION}?stale"))["Servers"]

    assert [(each["ID"], each["Leader"], each["Voter"]) for each in servers] == [
        ("n1", False, True),
        ("n2", True, True),
        ("n3", False, False),
    ]
    assert consistent == servers
    assert [each["Leader"] for each in stale] == [False, True, False]
    assert (stale == servers) is (node == "n2")


@pytest.mark.parametrize(
    ("unwell", "status", "tolerance"),
    [
        ({}, 200, 1),
        ({"n3": LEARNER}, 429, 0),
        ({"n3": GONE}, 429, 0),
        ({"n3": GONE, "n1": GONE}, 429, 0),
        ({"n3": replace(GONE, connected=True, last_contact=4.0)}, 429, 0),
    ],
)
async def test_health_through_a_follower(unwell: dict[str, PeerStatus], status: int, tolerance: int) -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        world.rafts["n2"].unwell = unwell
        answered = await world.fetch("GET", HEALTH)

    document = json.loads(answered.text)
    assert (answered.status, document["Healthy"], document["FailureTolerance"]) == (status, status == 200, tolerance)
    third = document["Servers"][2]
    assert third["LastContact"] == {None: "never", 4.0: "4s", 0.01: "10ms"}.get(
        unwell["n3"].last_contact if "n3" in unwell else 0.0, "20ms"
    )


async def test_the_autopilot_configuration_is_what_health_is_judged_by() -> None:
    async with running(dev=False) as world:
        document = await read(world, AUTOPILOT)

    assert document["LastContactThreshold"] == "300ms"
    assert document["CleanupDeadServers"] is False
    assert list(document)[:3] == ["CleanupDeadServers", "LastContactThreshold", "MaxTrailingLogs"]


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("node", ["n1", "n2"])
@pytest.mark.parametrize("to", ["", "?id=n1"])
async def test_leadership_is_transferred_from_any_node(method: str, node: str, to: str) -> None:
    async with running(dev=False, node=node, leader="n2") as world:
        views = {view.node for view in world.log.views}
        if "n1" not in views:
            world.log.elsewhere("n1")
        answered = await world.fetch(method, TRANSFER + to)
        leader = world.log.leadership.leader

    assert (answered.status, json.loads(answered.text)) == (200, {"Success": True})
    assert leader == "n1"


async def test_a_transfer_to_who_leads_already_is_done() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        answered = await world.fetch("PUT", f"{TRANSFER}?id=n2")

        assert answered.status == 200
        assert world.rafts["n2"].transfers == []


async def test_a_transfer_that_cannot_be_says_why() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        unknown = await world.fetch("PUT", f"{TRANSFER}?id=n9")
        world.rafts["n2"].stuck = True
        stuck = await world.fetch("PUT", TRANSFER)
        read_only = await world.fetch("GET", TRANSFER)
    async with running() as world:
        alone = await world.fetch("PUT", TRANSFER)

    assert (unknown.status, unknown.text) == (400, 'id "n9" is no server of this cluster; they are n1, n2, n3')
    assert (stuck.status, alone.status, read_only.status) == (503, 400, 405)
    assert "leadership was not handed over" in stuck.text
    assert read_only.headers["Allow"] == "OPTIONS,PUT,POST"


# -- metrics


async def test_metrics_count_what_happened() -> None:
    async with running(config={"CSRMaxPerSecond": 1}) as world:
        for service in ("a", "b"):
            await world.fetch("GET", f"/v1/agent/connect/ca/leaf/{service}")
        await world.fetch("DELETE", "/v1/agent/metrics/nowhere")
        document = await read(world, METRICS)

    gauges = {each["Name"]: each["Value"] for each in document["Gauges"]}
    counters = {(each["Name"], *each["Labels"].values()): each["Count"] for each in document["Counters"]}
    assert gauges["consul.mesh.active-root-ca.expiry"] > 3600 * 24 * 3000
    assert gauges["consul.cache.entries_count"] == 1
    assert gauges["consul.server.isLeader"] == gauges["consul.autopilot.healthy"] == 1
    assert counters["caserver.leaves.signed",] == 1
    assert counters["caserver.csr.refused", "RateLimited"] == 1
    assert counters["caserver.http.requests", "/v1/agent/connect/ca/leaf/", "GET", "200"] == 1
    assert counters["caserver.http.requests", "/v1/agent/connect/ca/leaf/", "GET", "429"] == 1
    assert counters["caserver.http.requests", "other", "other", "404"] == 1


async def test_metrics_of_a_follower_know_the_root_and_the_peers() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        text = (await world.fetch("GET", f"{METRICS}?format=prometheus")).text

    lines = text.splitlines()
    assert any(line.startswith("consul_mesh_active_root_ca_expiry ") for line in lines)
    assert 'caserver_raft_peer_connected{peer="n3"} 1' in lines
    assert "consul_server_isLeader 0" in lines
    assert not any(line.startswith(("caserver_raft_peer_lag", "consul_autopilot")) for line in lines)


async def test_json_shows_the_last_whole_interval_and_prometheus_totals() -> None:
    async with running() as world:
        live = "/v1/status/live"
        for _ in range(3):
            await world.fetch("GET", live)
        await world.clock.advance(10.0)
        await world.fetch("GET", live)
        first = await read(world, METRICS)
        await world.clock.advance(10.0)
        second = await read(world, METRICS)
        text = (await world.fetch("GET", f"{METRICS}?format=prometheus")).text

    def counted(document: Any) -> list[tuple[int, float]]:
        return [(each["Count"], each["Rate"]) for each in document["Counters"] if each["Labels"].get("path") == live]

    assert (counted(first), counted(second)) == ([(3, 0.3)], [(1, 0.1)])
    assert f'caserver_http_requests{{path="{live}",method="GET",status="200"}} 4' in text.splitlines()


async def test_an_unknown_format_of_metrics_is_refused() -> None:
    async with running() as world:
        assert (await world.fetch("GET", f"{METRICS}?format=xml")).status == 400


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?id=n2", "the servers of a cluster are those of the peer blocks"),
        ("?address=127.0.0.1:18621", "replaced under its own name: start the replacement with -rejoin"),
        ("?id=n9", 'id "n9" was not found in the Raft configuration'),
        ("?address=1.2.3.4:5", 'address "1.2.3.4:5" was not found in the Raft configuration'),
        ("", "Must specify either ?id with the server's ID or ?address with IP:port of peer to remove"),
        ("?id=n1&address=x", "Must specify only one of ?id or ?address"),
        ("?id=n1&dc=nope", "No path to datacenter"),
    ],
)
async def test_a_server_is_not_removed_while_the_cluster_runs(query: str, said: str) -> None:
    async with running(dev=False) as world:
        answered = await world.fetch("DELETE", f"/v1/operator/raft/peer{query}")

    assert (answered.status, said in answered.text) == (400, True), answered.text
