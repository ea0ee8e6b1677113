"""``/v1/snapshot`` over HTTP: what a client sees of saving and restoring, and everything that is refused."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from caserver import archive
from caserver.authority.ports import verdict
from caserver.backup import SEAL_PURPOSE
from caserver.internode.keyring import Keyring, Sealed
from caserver.state.codec import encode_state
from caserver.state.commands import RestoreAbort, RestoreChunk, RestoreCommit
from caserver.state.model import CAState
from tests.contract.world import KEYRING, START, Answered, World, running
from tests.testkit.fakes import settle
from tests.testkit.nodes import csr_for

PATH = "/v1/snapshot"
CONSULS = Path(__file__).parent / "data" / "consul-snapshot.tgz"
HOUR_OF_LEAVES = {"Provider": "consul", "Config": {"LeafCertTTL": "24h"}}
ANOTHER_ROOT = {"Provider": "consul", "Config": {"PrivateKeyBits": 384}}


@pytest.fixture(params=["n1", "n2"], ids=["leader", "follower"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with running(dev=False, node=request.param) as found:
        yield found


@pytest.fixture
async def leader() -> AsyncIterator[World]:
    async with running() as found:
        yield found


async def save(world: World, query: str = "") -> Answered:
    answer = await world.fetch("GET", PATH + query)
    assert answer.status == 200, answer.text
    return Answered(answer.status, answer.headers, unchunked(answer.body))


def unchunked(body: bytes) -> bytes:
    found, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        found += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return found


async def restore(world: World, data: bytes, query: str = "") -> Answered:
    return await world.fetch("PUT", PATH + query, body=data)


async def change(world: World, body: Mapping[str, object]) -> None:
    answer = await world.fetch("PUT", "/v1/connect/ca/configuration", body=json.dumps(body).encode())
    assert answer.status == 200, answer.text


async def configuration(world: World) -> dict[str, object]:
    found: dict[str, object] = json.loads((await world.fetch("GET", "/v1/connect/ca/configuration")).body)
    return found


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that the node tells nobody."""
    while not holds():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.01)


def archived(state: CAState, keyring: Keyring = KEYRING, *, seal: Sealed | None = None) -> bytes:
    """A snapshot of any state, sealed by anybody."""
    making = archive.Making(encode_state(state), index=state.index)
    while making.advance():
        pass
    seal = seal or keyring.seal(making.state_hash, purpose=SEAL_PURPOSE, nonce=bytes(12))
    return b"".join(making.finish(term=1, servers=(), seal=seal, now=START))


async def test_saving_answers_as_consul_does(world: World) -> None:
    answer = await world.fetch("GET", PATH, {"Accept-Encoding": "gzip"})

    assert list(answer.headers.items())[:4] == [
        ("X-Consul-Index", str(world.log.state.index)),
        ("X-Consul-Knownleader", "true"),
        ("X-Consul-Lastcontact", "0"),
        ("Vary", "Accept-Encoding"),
    ]
    assert answer.headers["Content-Type"] == "application/x-gzip"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert not {"Content-Encoding", "Content-Length", "Server"} & set(answer.headers)
    found = archive.read(io.BytesIO(unchunked(answer.body)))
    assert found.state == b"".join(encode_state(world.log.state))
    assert (found.meta.index, found.meta.servers[0].address) == (world.log.state.index, "127.0.0.1:18611")


async def test_a_saved_state_comes_back(world: World) -> None:
    await change(world, HOUR_OF_LEAVES)
    before = await configuration(world)
    saved = await save(world)
    await change(world, ANOTHER_ROOT)
    old = world.log.state
    answer = await restore(world, saved.body)

    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")
    state = world.log.state
    assert len(old.roots) == 2
    assert len(state.roots) == 1
    assert state.index > old.index
    assert state.ca_epoch > old.ca_epoch
    after = await configuration(world)
    assert after["Config"] == before["Config"]
    assert after["ModifyIndex"] == state.index


async def test_the_restored_ca_signs(world: World) -> None:
    saved = await save(world)
    await change(world, ANOTHER_ROOT)
    assert (await restore(world, saved.body)).status == 200
    await settle()
    answer = await world.fetch("GET", "/v1/agent/connect/ca/leaf/web")

    assert answer.status == 200, answer.text
    assert int(answer.headers["X-Consul-Index"]) > world.log.state.restored_index


async def test_waiting_queries_wake(world: World) -> None:
    saved = await save(world)
    index = json.loads((await world.fetch("GET", "/v1/connect/ca/roots")).body)["Roots"][0]["ModifyIndex"]
    waiting = asyncio.ensure_future(world.fetch("GET", f"/v1/connect/ca/roots?index={index}&wait=10m"))
    await until(lambda: world.node.blocked.count > 0)
    await restore(world, saved.body)
    answer = await asyncio.wait_for(waiting, 10)

    assert int(answer.headers["X-Consul-Index"]) == world.log.state.restored_index


async def test_a_leaf_of_another_past_is_renewed(leader: World) -> None:
    saved = await save(leader)
    first = await leader.fetch("GET", "/v1/agent/connect/ca/leaf/web")
    await restore(leader, saved.body)
    index = first.headers["X-Consul-Index"]
    renewed = await leader.fetch("GET", f"/v1/agent/connect/ca/leaf/web?index={index}&wait=2m", advance=60)

    assert int(renewed.headers["X-Consul-Index"]) > leader.log.state.restored_index


async def test_a_leaf_under_a_root_that_is_gone_is_not_served(leader: World) -> None:
    saved = await save(leader)
    await change(leader, ANOTHER_ROOT)
    first = await leader.fetch("GET", "/v1/agent/connect/ca/leaf/web")
    await restore(leader, saved.body)
    second = await leader.fetch("GET", "/v1/agent/connect/ca/leaf/web")

    assert second.headers["X-Cache"] == "MISS"
    assert json.loads(first.body)["SerialNumber"] != json.loads(second.body)["SerialNumber"]


async def test_a_large_body_in_chunks_is_taken(leader: World) -> None:
    saved = await save(leader)
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, saved.body[at : at + 1]) for at in range(len(saved.body))) + b"0\r\n\r\n"
    host, port = leader.server.addresses[0]
    reader, writer = await asyncio.open_connection(host, port)
    head = f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n".encode())
    invited = await reader.readuntil(b"\r\n\r\n")
    writer.write(chunks)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    assert invited == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.startswith(b"HTTP/1.1 200 OK")


async def test_the_state_may_be_this_nodes_own() -> None:
    async with running(dev=False, node="n2") as world:
        world.hop.sent = 0
        stale = await save(world, "?stale")

        assert world.hop.sent == 0
        assert stale.headers["X-Consul-Index"] == str(world.log.state.index)
        await save(world, "?consistent")
        assert world.hop.sent == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the snapshot is cut short"),
        (b"hello", "is not compressed as snapshots are"),
        (CONSULS.read_bytes(), "a snapshot of Consul itself"),
    ],
)
async def test_what_is_no_snapshot_changes_nothing(world: World, data: bytes, reason: str) -> None:
    before = world.log.state
    answer = await restore(world, data)

    assert (answer.status, reason in answer.text) == (400, True), answer.text
    assert world.log.state is before


async def test_a_snapshot_of_another_cluster_secret_names_the_key(world: World) -> None:
    other, before = Keyring([b"o" * 32]), world.log.state
    answer = await restore(world, archived(before, other))

    assert answer.status == 400
    assert f"sealed with key {other.key_ids[0]}" in answer.text
    assert "list the secret of the cluster that saved it" in answer.text
    assert world.log.state is before


async def test_a_snapshot_that_nobody_or_somebody_else_sealed_is_refused(leader: World) -> None:
    before = leader.log.state
    forged = KEYRING.seal(b"another hash", purpose=SEAL_PURPOSE, nonce=bytes(12))
    borrowed = before.sealed_hmac_key
    assert borrowed is not None
    for seal, reason in ((forged, "was altered"), (borrowed, "was altered"), (Sealed(b"x" * 60), "sealed with key")):
        answer = await restore(leader, archived(before, seal=seal))
        assert (answer.status, reason in answer.text) == (400, True), answer.text
    assert leader.log.state is before


async def test_a_snapshot_without_a_ca_would_take_it_away(leader: World) -> None:
    answer = await restore(leader, archived(CAState()))

    assert (answer.status, "holds no CA" in answer.text) == (400, True)


async def test_another_datacenter_is_refused(leader: World) -> None:
    assert (await leader.fetch("GET", f"{PATH}?dc=nope")).status == 400
    assert (await restore(leader, b"", "?dc=nope")).status == 400


async def test_a_body_over_the_limit_is_refused_unread(leader: World) -> None:
    host, port = leader.server.addresses[0]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {archive.ARCHIVE_MAX + 1}\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.close()

    assert head.startswith(b"HTTP/1.1 413")


async def test_a_client_that_goes_away_leaves_nothing(leader: World) -> None:
    before, saved = leader.log.state, await save(leader)
    host, port = leader.server.addresses[0]
    _, writer = await asyncio.open_connection(host, port)
    writer.write(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(saved.body)}\r\n\r\n".encode())
    writer.write(saved.body[:-1])
    await writer.drain()
    writer.close()
    answer = await restore(leader, b"")
    while answer.status == 503:  # the place of the first is not free yet
        answer = await restore(leader, b"")

    assert answer.status == 400
    assert leader.log.state is before


async def test_one_restore_at_a_time(world: World) -> None:
    saved, now = await save(world), int(world.clock.now().timestamp())
    begun = RestoreChunk("another", now, 0, "", ())
    verdict(await _leading(world).propose(begun))
    answer = await restore(world, saved.body)

    assert (answer.status, "another restore is in progress" in answer.text) == (409, True)
    _leading(world).commit(RestoreAbort("another", now))
    assert (await restore(world, saved.body)).status == 200


async def test_a_failure_on_the_way_gives_the_restore_up(world: World) -> None:
    saved, before = await save(world), world.log.state
    log = _leading(world)
    log.hold(RestoreCommit)
    restoring = asyncio.ensure_future(restore(world, saved.body))
    await until(lambda: log.state.restoring is not None)  # all of it is one piece
    assert log.state.restoring is not None
    log.commit(RestoreAbort(log.state.restoring.request_id, int(world.clock.now().timestamp())))
    log.release()
    answer = await asyncio.wait_for(restoring, 10)

    assert (answer.status, "was given up before it was whole" in answer.text) == (409, True)
    assert world.log.state.restoring is None
    assert world.log.state.roots == before.roots


async def test_without_connect_there_is_nothing_to_restore_into() -> None:
    async with running(enabled=False) as world:
        saved = await save(world)
        answer = await restore(world, saved.body)

        assert (answer.status, answer.text) == (500, "Connect must be enabled in order to use this endpoint")


async def test_a_request_from_before_is_not_signed_under_another_name(leader: World) -> None:
    other = "99999999-2872-2c69-9558-34f8baacf38a"
    async with running(cluster_id=other) as elsewhere:
        saved = await save(elsewhere)
    assert (await restore(leader, saved.body)).status == 200
    await settle()
    own = csr_for("web", trust_domain="838f036d-2872-2c69-9558-34f8baacf38a.consul")
    refused = await leader.fetch("PUT", "/v1/connect/ca/sign", body=own.encode())
    signed = await leader.fetch(
        "PUT", "/v1/connect/ca/sign", body=csr_for("web", trust_domain=f"{other}.consul").encode()
    )

    assert refused.status == 400
    assert signed.status == 200, signed.text
    assert leader.log.state.founding_id != leader.log.state.cluster_id == other


def _leading(world: World):  # noqa: ANN202 - the fake log of whichever node leads
    return next(view for view in world.log.views if view.leadership.is_leader)
