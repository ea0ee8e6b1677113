"""Streams on real sockets: who may talk, and what everybody else costs."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.internode.membership import Hello, Membership
from caserver.raft.messages import FRAME_BYTES_MAX, frame
from caserver.raft.streams import Limits, Streams
from tests.testkit.descriptors import no_more_descriptors

NAMES = ("n1", "n2", "n3")
KEYRING = Keyring([bytes(range(32))])
FOREIGN = Keyring([bytes(32)])
WITHIN = 60.0  # seconds for what is awaited; on a calm machine it happens at once
VOTE = {"type": "request_vote", "term": 7, "last_log_index": 3, "last_log_term": 6}


@dataclass
class Node:
    """One end: the streams, and what came out of them."""

    streams: Streams
    received: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    links: list[tuple[str, bool]] = field(default_factory=list)


@dataclass
class Cluster:
    """Addresses that all nodes share, filled in as they start."""

    addresses: dict[str, tuple[str, int]]

    async def start(
        self,
        name: str,
        *,
        keyring: Keyring = KEYRING,
        membership: Membership | None = None,
        present_as: str | None = None,
        listen_as: str | None = None,
        limits: Limits | None = None,
    ) -> Node:
        """Start a node; ``present_as`` is the name in its certificate, ``listen_as`` whose address it takes."""
        node = Node(streams=None)  # type: ignore[arg-type]
        node.streams = Streams(
            name,
            self.addresses,
            bind=("127.0.0.1", 0),
            identity=NodeIdentity(keyring, present_as or name, NAMES),
            membership=membership or Membership(NAMES),
            receive=lambda peer, message: node.received.append((peer, message)),
            on_link=lambda peer, up: node.links.append((peer, up)),
            limits=limits,
        )
        await node.streams.start()
        self.addresses[listen_as or name] = node.streams.address
        return node


@asynccontextmanager
async def running(*names: str, **options: Any) -> AsyncIterator[tuple[Cluster, list[Node]]]:
    # Port 9 (discard) refuses at once: a node that is not started yet.
    cluster = Cluster(dict.fromkeys(NAMES, ("127.0.0.1", 9)))
    nodes = [await cluster.start(name, **options) for name in names]
    try:
        yield cluster, nodes
    finally:
        await stop(*nodes)


async def stop(*nodes: Node) -> None:
    for node in nodes:
        node.streams.close()
    for node in nodes:
        await node.streams.wait_closed()


async def until(condition: Callable[[], object], seconds: float = WITHIN) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for happens inside the streams
            await asyncio.sleep(0.005)


async def dial(node: Node, context: ssl.SSLContext | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = node.streams.address
    return await asyncio.open_connection(host, port, ssl=context, server_hostname="" if context else None)


async def closed_by_peer(reader: asyncio.StreamReader, seconds: float = WITHIN) -> bool:
    async with asyncio.timeout(seconds):
        try:
            while await reader.read(1 << 16):
                pass
        except OSError:
            return True
    return True


def raw_hello(node: str, to: str, membership: Membership | None = None) -> bytes:
    payload = (membership or Membership(NAMES)).hello(node, to=to).encode()
    return len(payload).to_bytes(4) + payload


async def linked(node: Node, name: str = "n2") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An authenticated connection to ``node`` by hand, both hellos exchanged."""
    reader, writer = await dial(node, NodeIdentity(KEYRING, name, NAMES).client_context())
    writer.write(raw_hello(name, "n1"))
    length = int.from_bytes(await reader.readexactly(4))
    await reader.readexactly(length)
    return reader, writer


def reasons(logs: Sequence[Any], event: str = "peer_refused") -> list[str]:
    return [entry["reason"] for entry in logs if entry["event"] == event]


async def test_messages_arrive_in_order_under_the_name_of_the_certificate() -> None:
    async with running(*NAMES) as (_, (n1, n2, n3)):
        await until(lambda: all(each.streams.connected("n1") for each in (n2, n3)) and n1.streams.connected("n2"))
        for term in range(200):
            assert n2.streams.send("n1", {**VOTE, "term": term})
        await until(lambda: len(n1.received) == 200)

        assert [("n2", {**VOTE, "term": term}) for term in range(200)] == n1.received
        assert ("n2", True) in n1.links


class FirstRelease(Membership):
    """A node that knows no later kinds of messages."""

    def hello(self, node: str, *, to: str) -> Hello:
        return replace(super().hello(node, to=to), kinds=())


async def test_a_message_of_a_later_kind_goes_only_to_nodes_that_read_it() -> None:
    keys = {"type": "keys", "held": ["aa"], "stored": []}
    async with running("n1", "n3") as (cluster, (n1, n3)):
        n2 = await cluster.start("n2", membership=FirstRelease(NAMES))
        await until(lambda: n1.streams.connected("n2") and n1.streams.connected("n3"))
        for peer in ("n2", "n3"):
            assert n1.streams.send(peer, keys) == (peer == "n3")
            assert n1.streams.send(peer, VOTE)
        await until(lambda: n2.received and len(n3.received) == 2)

        assert n2.received == [("n1", VOTE)]
        assert n3.received == [("n1", keys), ("n1", VOTE)]
        await stop(n2)


async def test_a_message_to_a_peer_that_is_not_there_is_certainly_not_sent() -> None:
    async with running("n1") as (_, (n1,)):
        assert not n1.streams.send("n2", VOTE)
        assert not n1.streams.connected("n2")


async def test_a_peer_that_restarts_at_another_address_is_found_again() -> None:
    async with running("n1") as (cluster, (n1,)):
        for _ in range(2):
            n2 = await cluster.start("n2")
            await until(lambda: n1.streams.connected("n2"))
            await stop(n2)
            await until(lambda: not n1.streams.connected("n2"))

        assert n1.links == [("n2", True), ("n2", False)] * 2


async def test_the_newest_connection_of_a_peer_ends_its_older_one() -> None:
    async with running("n1") as (_, (n1,)):
        first, first_writer = await linked(n1)
        second, second_writer = await linked(n1)
        assert await closed_by_peer(first)
        second_writer.write(frame(VOTE))
        await until(lambda: n1.received)

        assert n1.received == [("n2", VOTE)]
        for writer in (first_writer, second_writer):
            writer.transport.abort()
        assert not second.at_eof()


@pytest.mark.parametrize(
    ("theirs", "word"),
    [
        (Membership(("n1", "n2")), "list of nodes"),
        (Membership(NAMES, "1:abcdef"), "generation"),
        (Membership(NAMES, cluster_id="22222222-0000-4000-8000-000000000000"), "cluster"),
    ],
    ids=["names", "generation", "cluster id"],
)
async def test_nodes_that_do_not_belong_together_refuse_each_other_on_both_sides(theirs: Membership, word: str) -> None:
    ours = Membership(NAMES, cluster_id="11111111-0000-4000-8000-000000000000")
    with capture_logs() as logs:
        async with running("n1", membership=ours) as (cluster, (n1,)):
            n2 = await cluster.start("n2", membership=theirs)
            await until(lambda: n1.streams.counts["peer_refused"] >= 2 and n2.streams.counts["peer_refused"] >= 2)

            assert not n1.links
            assert not n2.links
            assert all(word in reason for reason in reasons(logs))
            assert {"n1", "n2"} == {entry["peer"] for entry in logs if entry["event"] == "peer_refused"}
            await stop(n2)


async def test_another_reason_for_a_refusal_is_logged_at_once() -> None:
    with capture_logs() as logs:
        async with running("n1") as (_, (n1,)):
            for membership in (Membership(("n1", "n2")), Membership(NAMES, "1:abcdef"), Membership(("n1", "n2"))):
                reader, writer = await dial(n1, NodeIdentity(KEYRING, "n2", NAMES).client_context())
                writer.write(raw_hello("n2", "n1", membership))
                assert await closed_by_peer(reader)
                writer.transport.abort()
    said = reasons(logs)

    assert ["list of nodes" in reason for reason in said] == [True, False]
    assert "generation" in said[1]


async def test_a_refusal_is_logged_once_however_often_it_happens() -> None:
    with capture_logs() as logs:
        async with running("n1") as (_, (n1,)):
            for _ in range(3):
                reader, writer = await dial(n1, NodeIdentity(KEYRING, "n2", NAMES).client_context())
                writer.write(raw_hello("n2", "n1", Membership(("n1", "n2"))))
                assert await closed_by_peer(reader)
                writer.transport.abort()

            assert n1.streams.counts["peer_refused"] == 3
    assert len(reasons(logs)) == 1


async def test_a_node_at_the_address_of_another_is_told_apart() -> None:
    with capture_logs() as logs:
        async with running("n1") as (cluster, (n1,)):
            n3 = await cluster.start("n3", listen_as="n2")
            await until(lambda: n1.streams.counts["peer_refused"] and n3.streams.counts["peer_refused"])
            # Either side may count a refusal of the other direction first; each reason is said all the same.
            await until(lambda: any("node n3 answers there" in reason for reason in reasons(logs)))
            await until(lambda: any("looks for node n2" in reason for reason in reasons(logs)))

            assert not n1.streams.connected("n2")
            await stop(n3)


async def test_a_node_under_this_nodes_own_name_is_refused() -> None:
    with capture_logs() as logs:
        async with running("n1") as (cluster, (n1,)):
            twin = await cluster.start("n1", listen_as="n2")
            await until(lambda: n1.streams.counts["peer_refused"])

            await until(lambda: any("node n1 answers there" in reason for reason in reasons(logs)))
            await stop(twin)


async def test_a_name_that_the_certificate_does_not_hold_is_refused() -> None:
    async with running("n1") as (_, (n1,)):
        reader, writer = await dial(n1, NodeIdentity(KEYRING, "n3", NAMES).client_context())
        writer.write(raw_hello("n2", "n1"))
        assert await closed_by_peer(reader)
        writer.transport.abort()

        assert n1.streams.counts["peer_refused"] == 1


async def test_a_certificate_of_the_cluster_for_a_node_that_is_not_listed_is_refused() -> None:
    async with running("n1") as (_, (n1,)):
        reader, writer = await dial(n1, NodeIdentity(KEYRING, "n9", [*NAMES, "n9"]).client_context())
        writer.write(raw_hello("n9", "n1"))
        assert await closed_by_peer(reader)
        writer.transport.abort()

        assert not n1.received


async def test_nodes_of_another_secret_never_link() -> None:
    with capture_logs() as logs:
        async with running("n1") as (cluster, (n1,)):
            n2 = await cluster.start("n2", keyring=FOREIGN)
            await until(lambda: n1.streams.counts["peer_unreachable"] and n1.streams.counts["stranger_refused"])

            assert not n1.links
            assert not n2.links
            assert any("cluster_secret" in entry.get("error", "") for entry in logs)
            await stop(n2)


async def test_a_dialler_without_a_certificate_is_closed() -> None:
    from caserver.pki import tls

    authorities = NodeIdentity(KEYRING, "n2", NAMES)._authorities_pem
    async with running("n1") as (_, (n1,)):
        reader, writer = await dial(n1, tls.client_context(None, None, ca_pems=authorities))
        writer.write(raw_hello("n2", "n1"))

        assert await closed_by_peer(reader)
        writer.transport.abort()


async def test_tls_below_1_3_is_not_spoken() -> None:
    async with running("n1") as (_, (n1,)):
        context = NodeIdentity(KEYRING, "n2", NAMES).client_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = ssl.TLSVersion.TLSv1_2

        with pytest.raises(OSError):
            await dial(n1, context)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95pickle", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(400)],
    ids=["http", "pickle", "half a client hello"],
)
async def test_plain_bytes_instead_of_tls_are_closed(garbage: bytes) -> None:
    async with running("n1") as (_, (n1,)):
        reader, writer = await dial(n1, None)
        writer.write(garbage)
        writer.write_eof()

        assert await closed_by_peer(reader)
        writer.transport.abort()


@pytest.mark.parametrize(
    "sent",
    [
        (FRAME_BYTES_MAX + 1).to_bytes(4),
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x04nope",
        b"\x00\x00\x00\x02{}",
        b'\x00\x00\x00\x15{"type":"membership"}',
        b'\x00\x00\x00\x17{"type":"response_vote"}',
    ],
)
async def test_what_is_not_a_message_ends_the_connection_and_nothing_else(sent: bytes) -> None:
    async with running("n1") as (_, (n1,)):
        reader, writer = await linked(n1)
        writer.write(frame(VOTE) + sent + frame(VOTE))
        assert await closed_by_peer(reader)
        writer.transport.abort()

        assert n1.received == [("n2", VOTE)]
        _, again = await linked(n1)
        again.write(frame(VOTE))
        await until(lambda: len(n1.received) == 2)
        again.transport.abort()


async def test_an_oversize_hello_is_refused_before_it_is_read() -> None:
    async with running("n1") as (_, (n1,)):
        reader, writer = await dial(n1, NodeIdentity(KEYRING, "n2", NAMES).client_context())
        writer.write((1 << 20).to_bytes(4) + b"x" * 100)

        assert await closed_by_peer(reader)
        writer.transport.abort()


@pytest.mark.parametrize("encrypted", [False, True], ids=["in the handshake", "in the hello"])
async def test_a_stranger_that_says_nothing_is_closed_in_time(encrypted: bool) -> None:
    async with running("n1", limits=Limits(hello_seconds=0.5)) as (_, (n1,)):
        context = NodeIdentity(KEYRING, "n2", NAMES).client_context() if encrypted else None
        with suppress(OSError):  # closed before a slow machine was through with the handshake
            reader, writer = await dial(n1, context)
            assert await closed_by_peer(reader)
            writer.transport.abort()
        await until(lambda: n1.streams.counts["stranger_refused"])


@pytest.mark.parametrize("encrypted", [False, True], ids=["in the handshake", "in the hello"])
async def test_a_stranger_that_trickles_is_closed_in_time(encrypted: bool) -> None:
    async with running("n1", limits=Limits(hello_seconds=0.5)) as (_, (n1,)):
        context = NodeIdentity(KEYRING, "n2", NAMES).client_context() if encrypted else None
        with suppress(OSError):  # closed before a slow machine was through with the handshake
            reader, writer = await dial(n1, context)
            closed = asyncio.ensure_future(closed_by_peer(reader))
            for byte in raw_hello("n2", "n1") if encrypted else b"\x16\x03\x01\x02\x00\x01" + bytes(500):
                if closed.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)

            assert await closed
            writer.transport.abort()
        await until(lambda: n1.streams.counts["stranger_refused"])
        assert not n1.links
        assert not n1.streams._inbound


async def test_a_flood_of_strangers_does_not_keep_a_peer_out() -> None:
    async with running("n1") as (cluster, (n1,)):
        flood = [await dial(n1, None) for _ in range(2 * Limits().strangers)]
        n2 = await cluster.start("n2")
        await until(lambda: n2.streams.connected("n1"))

        assert len(n1.streams._strangers) <= Limits().strangers
        assert n1.streams.counts["stranger_evicted"]
        for _, writer in flood:
            writer.transport.abort()
        await stop(n2)


async def test_the_listener_outlives_the_want_of_descriptors() -> None:
    loop = asyncio.get_running_loop()
    async with running("n1") as (cluster, (n1,)):
        with socket.socket() as dialled:
            dialled.setblocking(False)
            with no_more_descriptors():
                await loop.sock_connect(dialled, n1.streams.address)
                await until(lambda: n1.streams.counts["accept_failed"] >= 2)
        n2 = await cluster.start("n2")
        await until(lambda: n1.streams.connected("n2") and n2.streams.connected("n1"))

        assert n1.links == [("n2", True)]
        await stop(n2)


async def test_a_frame_that_never_ends_is_not_waited_for() -> None:
    async with running("n1", limits=Limits(frame_seconds=0.1)) as (_, (n1,)):
        reader, writer = await linked(n1)
        writer.write(frame(VOTE) + frame(VOTE)[:-1])
        assert await closed_by_peer(reader)
        writer.transport.abort()

        assert n1.received == [("n2", VOTE)]


async def test_a_link_that_is_silent_between_messages_stays() -> None:
    brief = Limits(dial_seconds=0.5, hello_seconds=0.5, frame_seconds=0.1)
    async with running("n1", "n2", limits=brief) as (_, (n1, n2)):
        await until(lambda: n2.streams.connected("n1"))
        before = list(n2.links)  # a slow machine may have needed several attempts
        await asyncio.sleep(0.7)
        assert n2.streams.send("n1", VOTE)
        await until(lambda: n1.received)

        assert n2.links == before


async def test_peers_may_be_dialled_by_host_name() -> None:
    async with running("n1", "n2") as (cluster, (n1, n2)):
        cluster.addresses["n2"] = ("localhost", n2.streams.address[1])
        await until(lambda: n1.streams.connected("n2"))


async def test_a_host_name_that_does_not_resolve_is_tried_again() -> None:
    with capture_logs() as logs:
        async with running("n1") as (cluster, (n1,)):
            cluster.addresses["n2"] = ("no-such-host.invalid", 8300)
            await until(lambda: n1.streams.counts["peer_unreachable"] >= 3)
            n2 = await cluster.start("n2")
            await until(lambda: n1.streams.connected("n2"))
            await stop(n2)
    assert len([entry for entry in logs if entry["event"] == "peer_unreachable" and entry["peer"] == "n2"]) == 1


async def test_a_peer_that_does_not_read_is_dropped() -> None:
    piece = {"type": "append_entries", "term": 1, "commit_index": 1, "serialized": [bytes(256 << 10), True, False]}
    async with running("n1", limits=Limits(send_bytes=4 << 20)) as (cluster, (n1,)):
        n2 = await cluster.start("n2")
        await until(lambda: n1.streams.connected("n2"))
        most = 0
        # Without a turn of the loop the other end reads nothing, and the kernel's buffers fill up.
        for _ in range(200):
            most = max(most, n1.streams.waiting_bytes("n2"))
            if not n1.streams.send("n2", piece):
                break

        assert not n1.streams.connected("n2")
        assert ("n2", False) in n1.links
        assert 0 < most <= 4 << 20
        await until(lambda: n1.streams.connected("n2"))
        await stop(n2)


async def test_links_end_when_a_cluster_id_turns_out_to_differ() -> None:
    async with running("n1") as (cluster, (n1,)):
        membership = Membership(NAMES)
        n2 = await cluster.start("n2", membership=membership)
        n1.streams._membership.adopt("11111111-0000-4000-8000-000000000000")
        await until(lambda: n1.streams.connected("n2") and n2.streams.connected("n1"))
        membership.adopt("22222222-0000-4000-8000-000000000000")
        n2.streams.recheck()
        await until(lambda: n1.streams.counts["peer_refused"] and n2.streams.counts["peer_refused"])

        assert not n1.streams.connected("n2")
        assert not n2.streams.connected("n1")
        await stop(n2)


async def test_what_receive_raises_reaches_the_owner_of_the_loop() -> None:
    seen: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
    async with running("n1") as (_, (n1,)):
        failure = RuntimeError("the engine failed")

        def fail(peer: str, message: Any) -> None:
            raise failure

        n1.streams._receive = fail
        reader, writer = await linked(n1)
        writer.write(frame(VOTE))
        assert await closed_by_peer(reader)
        writer.transport.abort()

        assert [failure] == seen


async def test_close_ends_every_task_and_frees_the_port() -> None:
    async with running("n1", "n2") as (_, (n1, n2)):
        await until(lambda: n1.streams.connected("n2") and n2.streams.connected("n1"))
        address = n1.streams.address
        await stop(n1)

        assert ("n2", False) in n1.links
        assert not n1.streams._tasks
        with socket.create_server(address):
            pass


async def test_a_close_at_any_moment_of_a_handshake_leaves_no_connection_behind() -> None:
    """Two nodes that dial each other are closed after so many turns of the loop; garbage would complain later."""
    open_ones = asyncio.get_running_loop()._transports  # type: ignore[attr-defined]
    for turns in range(60):
        async with running("n1", "n2"):
            for _ in range(turns):
                await asyncio.sleep(0)
        assert [each for each in open_ones.values() if each._sock is not None] == [], f"after {turns} turns"
