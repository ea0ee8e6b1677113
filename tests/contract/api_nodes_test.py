from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from caserver.api.server import ApiServer, Listener
from caserver.errors import ReloadFailed
from tests.contract.world import Answered, World, running
from tests.testkit.acl_world import MASTER, UNKNOWN, get, guarded, secret_of

MEMBERS, NODES, CHECKS = "/v1/agent/members", "/v1/catalog/nodes", "/v1/health/node/"
METADATA = {"X-Consul-Index", "X-Consul-Knownleader", "X-Consul-Lastcontact"}


def read(answered: Answered) -> Any:
    assert answered.status == 200, answered.text
    return json.loads(answered.text)


async def test_members_are_the_servers_as_serf_would_describe_them() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        world.log.link("n3", up=False)
        answered = await world.fetch("GET", f"{MEMBERS}?segment=_all")
    members = read(answered)

    assert [(each["Name"], each["Status"]) for each in members] == [("n1", 1), ("n2", 1), ("n3", 4)]
    assert list(members[0]) == [
        "Name",
        "Addr",
        "Port",
        "Tags",
        "Status",
        "ProtocolMin",
        "ProtocolMax",
        "ProtocolCur",
        "DelegateMin",
        "DelegateMax",
        "DelegateCur",
    ]
    assert {key: members[1]["Tags"][key] for key in ("dc", "expect", "port", "role", "segment", "vsn")} == {
        "dc": "dc1",
        "expect": "3",
        "port": "18621",
        "role": "consul",
        "segment": "",
        "vsn": "2",
    }
    assert members[0]["Tags"]["build"].startswith("1.8.7:")
    assert list(members[0]["Tags"]) == sorted(members[0]["Tags"])
    assert not METADATA & set(answered.headers)


async def test_across_datacenters_a_member_is_called_by_its_own() -> None:
    async with running() as world:
        wide = read(await world.fetch("GET", f"{MEMBERS}?wan=1"))
        odd = await world.fetch("GET", f"{MEMBERS}?segment=alpha")
        across = await world.fetch("GET", f"{MEMBERS}?wan=1&segment=alpha")

    assert [each["Name"] for each in wide] == ["n1.dc1"]
    assert (odd.status, odd.text) == (400, "Network segments are not supported in this version of Consul")
    assert (across.status, across.text) == (400, "Cannot provide a segment with wan=true")


async def test_the_catalog_knows_the_servers() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        answered = await world.fetch("GET", NODES)
        nodes = read(answered)
        through_other = read(await world.fetch("GET", f"{NODES}?stale"))
        of_meta = read(await world.fetch("GET", f"{NODES}?node-meta=rack:1"))
        plain_meta = read(await world.fetch("GET", f"{NODES}?node-meta=consul-network-segment:"))
        members = read(await world.fetch("GET", MEMBERS))

    assert [each["Node"] for each in nodes] == ["n1", "n2", "n3"]
    assert nodes[0] == {
        "ID": members[0]["Tags"]["id"],
        "Node": "n1",
        "Address": "127.0.0.1",
        "Datacenter": "dc1",
        "TaggedAddresses": dict.fromkeys(("lan", "lan_ipv4", "wan", "wan_ipv4"), "127.0.0.1"),
        "Meta": {"consul-network-segment": ""},
        "CreateIndex": 1,
        "ModifyIndex": int(answered.headers["X-Consul-Index"]),
    }
    assert list(nodes[0]) == [
        "ID",
        "Node",
        "Address",
        "Datacenter",
        "TaggedAddresses",
        "Meta",
        "CreateIndex",
        "ModifyIndex",
    ]
    assert len({uuid.UUID(each["ID"]) for each in nodes}) == 3
    assert set(answered.headers) >= METADATA
    assert (through_other, of_meta, plain_meta) == (nodes, [], nodes)


@pytest.mark.parametrize(
    ("name", "status", "output"),
    [("n2", "passing", "Agent alive and reachable"), ("N3", "critical", "Agent not live or unreachable")],
)
async def test_a_server_has_the_check_that_every_node_has(name: str, status: str, output: str) -> None:
    async with running(dev=False) as world:
        world.log.link("n3", up=False)
        (check,) = read(await world.fetch("GET", f"{CHECKS}{name}"))

    assert list(check) == [
        "Node",
        "CheckID",
        "Name",
        "Status",
        "Notes",
        "Output",
        "ServiceID",
        "ServiceName",
        "ServiceTags",
        "Type",
        "Definition",
        "CreateIndex",
        "ModifyIndex",
    ]
    assert (check["Node"], check["CheckID"], check["Name"]) == (name.lower(), "serfHealth", "Serf Health Status")
    assert (check["Status"], check["Output"], check["ServiceTags"], check["Definition"]) == (status, output, [], {})


async def test_a_node_that_is_no_server_has_no_check_and_no_name_is_a_mistake() -> None:
    async with running() as world:
        unknown = read(await world.fetch("GET", f"{CHECKS}client-7"))
        missing = await world.fetch("GET", CHECKS)
        filtered = await world.fetch("GET", f"{NODES}?filter=Node==n1")
        elsewhere = await world.fetch("GET", f"{NODES}?dc=nope")

    assert unknown == []
    assert (missing.status, missing.text) == (400, "Missing node name")
    assert filtered.status == 400
    assert (elsewhere.status, elsewhere.text) == (400, "No path to datacenter")


async def waiting(world: World, path: str) -> asyncio.Task[Answered]:
    """A query that waits: it has taken its place."""
    asked = asyncio.ensure_future(world.fetch("GET", path))
    async with asyncio.timeout(10):
        while not world.node.blocked.count:  # noqa: ASYNC110 - what sockets do has no event to await
            await asyncio.sleep(0.001)
    return asked


@pytest.mark.parametrize("path", [NODES, f"{CHECKS}n3"])
async def test_a_query_waits_until_a_server_goes(path: str) -> None:
    async with running(dev=False) as world:
        first = await world.fetch("GET", path)
        index = int(first.headers["X-Consul-Index"])
        asked = await waiting(world, f"{path}?index={index}&wait=60s")
        await world.clock.advance(5.0)
        assert not asked.done()
        world.log.link("n3", up=False)
        answered = await asyncio.wait_for(asked, 10)  # and the clock stands still: nobody looks now and then

    assert int(answered.headers["X-Consul-Index"]) > index


async def test_those_who_wait_ask_the_raft_thread_nothing_and_wake_together() -> None:
    async with running(dev=False) as world:
        index = (await world.fetch("GET", NODES)).headers["X-Consul-Index"]
        before = world.rafts["n1"].asked
        tasks = [asyncio.ensure_future(world.fetch("GET", f"{NODES}?index={index}&wait=600s")) for _ in range(20)]
        async with asyncio.timeout(10):
            while world.node.blocked.count < len(tasks):  # noqa: ASYNC110 - what sockets do has no event to await
                await asyncio.sleep(0.001)
        await world.clock.advance(5.0)
        assert world.rafts["n1"].asked == before
        world.log.link("n2", up=False)
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        away = answers[0].headers["X-Consul-Index"]
        world.log.link("n2", up=True)
        back = await world.fetch("GET", f"{NODES}?index={away}&wait=600s")

    assert len({each.headers["X-Consul-Index"] for each in answers}) == 1
    assert int(index) < int(away) < int(back.headers["X-Consul-Index"])


async def test_a_query_that_nothing_happens_to_ends_with_its_time() -> None:
    async with running(dev=False) as world:
        first = await world.fetch("GET", NODES)
        index = first.headers["X-Consul-Index"]
        answered = await world.fetch("GET", f"{NODES}?index={index}&wait=2s", advance=10.0)

    assert (answered.headers["X-Consul-Index"], answered.text) == (index, first.text)


async def test_without_a_leader_only_what_may_be_stale_is_told() -> None:
    async with running(dev=False) as world:
        world.log.step_down()
        held = await world.fetch("GET", NODES, advance=12.0)
        stale = await world.fetch("GET", f"{NODES}?stale")
        members = await world.fetch("GET", MEMBERS)

    assert (held.status, held.text, held.headers["X-Consul-Knownleader"]) == (500, "No cluster leader", "false")
    assert (stale.status, members.status) == (200, 200)


# -- the agent itself


def described(document: Mapping[str, Any]) -> tuple[str, str, bool]:
    config = document["Config"]
    return config["NodeName"], config["Datacenter"], config["Server"]


async def test_an_agent_describes_itself() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        answered = await world.fetch("GET", "/v1/agent/self")
    document = read(answered)
    debug = document["DebugConfig"]

    assert list(document) == ["Config", "DebugConfig", "Coord", "Member", "Stats", "Meta"]
    assert list(document["Config"]) == ["Datacenter", "NodeName", "NodeID", "Revision", "Server", "Version"]
    assert described(document) == ("n1", "dc1", True)
    assert document["Config"]["NodeID"] == document["Member"]["Tags"]["id"] == debug["NodeID"]
    assert (debug["BootstrapExpect"], debug["ServerMode"], debug["ConnectEnabled"]) == (3, True, True)
    assert (debug["HTTPAddrs"], debug["RPCAdvertiseAddr"]) == (["tcp://127.0.0.1:8500"], "tcp://127.0.0.1:18611")
    assert list(debug) == sorted(debug)
    assert document["Stats"]["consul"]["leader_addr"] == "127.0.0.1:18621"
    assert (document["Stats"]["raft"]["state"], document["Stats"]["raft"]["num_peers"]) == ("Follower", "2")


async def test_an_agent_does_not_show_its_secrets() -> None:
    async with running(dev=False) as world:
        secrets = [each.reveal() for each in world.node.settings().cluster_secrets]
        text = (await world.fetch("GET", "/v1/agent/self")).text

    assert secrets
    assert not [each for each in secrets if each in text]
    assert json.loads(text)["DebugConfig"]["EncryptKey"] == "hidden"


async def test_an_agent_without_a_leader_still_describes_itself() -> None:
    async with running(dev=False) as world:
        world.log.step_down()
        stats = read(await world.fetch("GET", "/v1/agent/self"))["Stats"]

    assert (stats["raft"]["state"], stats["consul"]["leader_addr"]) == ("Candidate", "")


async def test_a_reload_is_asked_for_and_its_fault_is_told() -> None:
    async with running() as world:
        done = await world.fetch("PUT", "/v1/agent/reload")
        world.reloads.fault = ReloadFailed("the settings stay as they are: n1.hcl: x: unknown key")
        failed = await world.fetch("PUT", "/v1/agent/reload")

    assert (done.status, done.body, done.headers.get("Content-Type")) == (200, b"", None)
    assert (failed.status, failed.text) == (500, "the settings stay as they are: n1.hcl: x: unknown key")
    assert world.reloads.count == 2


# -- may one service connect to another


def uri(world: World, service: str = "web") -> str:
    return f"spiffe://{world.log.state.trust_domain}/ns/default/dc/dc1/svc/{service}"


async def asked(world: World, body: object) -> Answered:
    text = body if isinstance(body, str) else json.dumps(body)
    return await world.fetch("POST", "/v1/agent/connect/authorize", body=text.encode())


async def test_a_service_of_this_mesh_may_connect() -> None:
    async with running(dev=False) as world:
        answered = await asked(world, {"Target": "db", "ClientCertURI": uri(world), "ClientCertSerial": "04"})

    assert answered.text == '{"Authorized":true,"Reason":"ACLs disabled, access is allowed by default"}'
    assert answered.headers["X-Cache"] == "MISS"
    assert not METADATA & set(answered.headers)


async def test_what_holds_by_default_can_be_set() -> None:
    async with running() as world:
        settings = world.node.settings()
        denying = replace(settings, connect=replace(settings.connect, authorize_default="deny"))
        server = ApiServer(replace(world.node, settings=lambda: denying), [Listener("127.0.0.1", 0)])
        await server.start()
        await world.server.close()
        world.server = server
        answered = read(await asked(world, {"target": "db", "clientcerturi": uri(world)}))

    assert answered == {"Authorized": False, "Reason": "Default behavior configured by connect { authorize_default }"}


async def test_a_service_of_another_trust_domain_may_not_connect() -> None:
    foreign = "spiffe://11111111-2222-3333-4444-555555555555.consul/ns/default/dc/dc1/svc/web"
    async with running() as world:
        answered = read(await asked(world, {"Target": "db", "ClientCertURI": foreign}))
        upper = read(await asked(world, {"Target": "db", "ClientCertURI": uri(world).replace("spiffe", "SPIFFE")}))

    assert (answered["Authorized"], upper["Authorized"]) == (False, True)
    assert answered["Reason"].startswith("Identity from an external trust domain: 11111111-")


NOT_CONNECT = "Bad request: ClientCertURI not a valid Connect identifier"
NOT_SERVICE = "Bad request: ClientCertURI not a valid Service identifier"
DECODE = "Bad request: Request decode failed: "


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("", f"{DECODE}EOF"),
        ("{", f"{DECODE}unexpected EOF"),
        ("[]", f"{DECODE}json: cannot unmarshal array into Go value of type structs.ConnectAuthorizeRequest"),
        ({"Target": 1}, f"{DECODE}json: cannot unmarshal number into Go struct field ConnectAuthorizeRequest.Target of type string"),
        ({"Target": "db", "Foo": ""}, f'{DECODE}json: unknown field "Foo"'),
        ({}, "Bad request: Target service must be specified"),
        ({"Target": None}, "Bad request: Target service must be specified"),
        ({"Target": "db"}, NOT_CONNECT),
        ({"Target": "db", "ClientCertURI": "https://x"}, NOT_CONNECT),
        ({"Target": "db", "ClientCertURI": "spiffe://x.consul/ns/default/dc/dc1/svc/a%2Fb"}, NOT_CONNECT),
        ({"Target": "db", "ClientCertURI": "spiffe://x.consul/agent/client/dc/dc1/id/n1"}, NOT_SERVICE),
        ({"Target": "db", "ClientCertURI": "spiffe://x.consul"}, NOT_SERVICE),
    ],
)  # fmt: skip
async def test_a_question_that_is_none_is_the_callers_mistake(body: object, text: str) -> None:
    async with running() as world:
        answered = await asked(world, body)

    assert (answered.status, answered.text.split("\n")[0]) == (400, text)


async def test_only_post_is_a_question() -> None:
    async with running() as world:
        answered = await world.fetch("GET", "/v1/agent/connect/authorize")

    assert (answered.status, answered.headers["Allow"]) == (405, "OPTIONS,POST")


# -- with access control


async def test_a_caller_sees_the_servers_that_it_may_read_of() -> None:
    async with guarded(dev=False) as world:
        own = await secret_of(world, 'node "n1" { policy = "read" }')
        most = await secret_of(world, 'node_prefix "" { policy = "read" } node "n2" { policy = "deny" }')
        seen = {
            (token, path): read(await get(world, path, token))
            for token in (own, most, MASTER)
            for path in (MEMBERS, NODES, f"{CHECKS}n2")
        }
        nobody = {path: await get(world, path, token="") for path in (MEMBERS, NODES, f"{CHECKS}n1")}
        unknown = {path: await get(world, path, token=UNKNOWN) for path in (MEMBERS, NODES, f"{CHECKS}n1")}
        index = nobody[NODES].headers["X-Consul-Index"]
        at_once = await get(world, f"{NODES}?index={index}&wait=600s", token=UNKNOWN)

    assert [[each["Name"] for each in seen[token, MEMBERS]] for token in (own, most, MASTER)] == [
        ["n1"],
        ["n1", "n3"],
        ["n1", "n2", "n3"],
    ]
    assert [len(seen[token, NODES]) for token in (own, most, MASTER)] == [1, 2, 3]
    assert [len(seen[token, f"{CHECKS}n2"]) for token in (own, most, MASTER)] == [0, 0, 1]
    assert seen[MASTER, MEMBERS][0]["Tags"]["acls"] == "1"
    assert {path: (each.status, each.text) for path, each in nobody.items()} == dict.fromkeys(nobody, (200, "[]"))
    assert {(each.status, each.text) for each in (*unknown.values(), at_once)} == {(403, "ACL not found")}


async def test_the_checks_of_a_namespace_are_refused() -> None:
    async with running() as world:
        answered = await world.fetch("GET", "/v1/health/node/n1?ns=team")

    assert (answered.status, answered.text.partition(" - ")[0]) == (400, 'Bad request: Invalid query parameter: "ns"')
