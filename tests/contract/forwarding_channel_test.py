import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from caserver.errors import CaserverError, CommitUnknown, Conflict, NotLeader
from caserver.fields import Secret
from caserver.forwarding.channel import Channel
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.requests import Answer, Caller, ReadAt, ReadIndex, Request, SignLeaves, decode_answer, encode_request

OURS, THEIRS = Keyring([b"o" * 32]), Keyring([b"t" * 32])
WITHIN = 60.0  # seconds for one frame there and back
NODES = ("n1", "n2", "n3")
CALLER = Caller(token=Secret("hush"), source="n3 10.1.2.3:4", request_id="ab")


class Authority:
    """What the other end does with a request."""

    def __init__(self) -> None:
        self.seen: list[tuple[Caller, Request]] = []
        self.outcome: Answer | BaseException = ReadAt(7)
        self.gate = asyncio.Event()
        self.gate.set()

    async def execute(self, caller: Caller, request: Request) -> Answer:
        self.seen.append((caller, request))
        await self.gate.wait()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@asynccontextmanager
async def channel(
    node: str,
    addresses: dict[str, tuple[str, int]],
    authority: Authority,
    *,
    keyring: Keyring = OURS,
    frame_max: int = 1 << 20,
) -> AsyncIterator[Channel]:
    made = Channel(
        NodeIdentity(keyring, node, NODES),
        node,
        peers=addresses,
        bind=("127.0.0.1", 0),
        serve=authority.execute,
        frame_max=frame_max,
    )
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def pair(
    *, client: str = "n1", server: str = "n2", dialled: str = "n2", keyring: Keyring = OURS, frame_max: int = 1 << 20
) -> AsyncIterator[tuple[Channel, Authority]]:
    """A client end, and a server end that it knows as ``dialled``."""
    authority = Authority()
    others = dict.fromkeys(NODES, ("127.0.0.1", 1))
    async with (
        channel(server, others, authority, frame_max=frame_max) as serving,
        channel(client, others | {dialled: serving.address}, Authority(), keyring=keyring) as asking,
    ):
        yield asking, authority


async def test_a_frame_arrives_and_its_answer_comes_back() -> None:
    async with pair() as (asking, authority):
        answer = decode_answer(await asking.send("n2", encode_request(CALLER, SignLeaves(("pem",))), WITHIN))
    caller, request = authority.seen[0]

    assert answer == ReadAt(7)
    assert (caller.token, caller.request_id, request) == (CALLER.token, "ab", SignLeaves(("pem",)))


@pytest.mark.parametrize(
    ("claimed", "told"),
    [("n3 10.1.2.3:4", "n1 10.1.2.3:4"), ("n3 user 1000", "n1 user 1000"), ("n3 ", "n1"), ("n3", "n1")],
)
async def test_the_origin_is_told_behind_the_name_that_the_certificate_proves(claimed: str, told: str) -> None:
    async with pair() as (asking, authority):
        await asking.send("n2", encode_request(replace(CALLER, source=claimed), ReadIndex()), WITHIN)

    assert authority.seen[0][0].source == told


async def test_frames_share_a_connection() -> None:
    async with pair() as (asking, authority):
        for _ in range(3):
            await asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)
        connections = asking._sessions["n2"].connector

        assert connections is not None
        assert sum(len(each) for each in connections._conns.values()) == 1
        assert len(authority.seen) == 3


async def test_frames_travel_at_the_same_time() -> None:
    async with pair() as (asking, authority):
        authority.gate.clear()
        sends = [
            asyncio.ensure_future(asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)) for _ in range(8)
        ]
        for _ in range(1000):
            if len(authority.seen) == 8:
                break
            await asyncio.sleep(0.002)
        authority.gate.set()

        assert len(await asyncio.gather(*sends)) == 8


@pytest.mark.parametrize(
    ("outcome", "raised"),
    [
        (NotLeader("this node does not lead"), NotLeader),
        (Conflict("stale"), Conflict),
        (ZeroDivisionError(), CaserverError),
    ],
)
async def test_a_failure_of_the_other_end_is_raised_as_what_it_was(
    outcome: BaseException, raised: type[CaserverError]
) -> None:
    async with pair() as (asking, authority):
        authority.outcome = outcome
        frame = await asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)

    with pytest.raises(raised) as caught:
        decode_answer(frame)
    assert type(caught.value) is raised


async def test_a_node_that_does_not_listen_was_certainly_not_told() -> None:
    async with channel("n1", {"n2": ("127.0.0.1", 1)}, Authority()) as asking:
        with pytest.raises(NotLeader, match="n2 cannot be reached"):
            await asking.send("n2", b"{}", WITHIN)


async def test_an_unknown_node_is_not_dialled() -> None:
    async with channel("n1", {}, Authority()) as asking:
        with pytest.raises(NotLeader, match="not among the configured peers"):
            await asking.send("n9", b"{}", WITHIN)


async def test_silence_until_the_deadline_is_an_open_outcome() -> None:
    async with pair() as (asking, authority):
        authority.gate.clear()
        with pytest.raises(CommitUnknown):
            await asking.send("n2", encode_request(CALLER, ReadIndex()), 0.1)
        authority.gate.set()


async def test_a_connection_that_breaks_leaves_the_outcome_open() -> None:
    authority = Authority()
    authority.gate.clear()
    async with channel("n2", dict.fromkeys(NODES, ("127.0.0.1", 1)), authority) as serving:
        async with channel("n1", {"n2": serving.address}, Authority()) as asking:
            send = asyncio.ensure_future(asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN))
            while not authority.seen:  # noqa: ASYNC110 the event is in the other end's socket
                await asyncio.sleep(0.002)
            assert serving._http is not None
            for connection in serving._http.connections:
                connection.force_close()

            with pytest.raises(CommitUnknown):
                await send
        authority.gate.set()


async def test_nothing_is_sent_to_a_node_that_is_not_the_one_dialled() -> None:
    async with pair(server="n3", dialled="n2") as (asking, authority):
        with pytest.raises(NotLeader):
            await asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)

        assert authority.seen == []


async def test_a_node_with_another_secret_gets_nowhere() -> None:
    async with pair(keyring=THEIRS) as (asking, authority):
        with pytest.raises((NotLeader, CommitUnknown)):
            await asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)

        assert authority.seen == []


async def test_a_node_outside_the_peer_list_is_refused() -> None:
    authority = Authority()
    async with (
        channel("n2", {"n3": ("127.0.0.1", 1)}, authority) as serving,
        channel("n1", {"n2": serving.address}, Authority()) as asking,
    ):
        with pytest.raises(CommitUnknown):
            await asking.send("n2", encode_request(CALLER, ReadIndex()), WITHIN)

    assert authority.seen == []


async def test_a_frame_that_is_too_large_is_refused() -> None:
    async with pair(frame_max=100) as (asking, authority):
        frame = await asking.send("n2", encode_request(CALLER, SignLeaves(("x" * 200,))), WITHIN)

        with pytest.raises(CaserverError, match="larger than"):
            decode_answer(frame)
        assert authority.seen == []


async def test_the_listener_serves_nothing_else() -> None:
    import aiohttp

    async with channel("n2", dict.fromkeys(NODES, ("127.0.0.1", 1)), Authority()) as serving:
        host, port = serving.address
        context = NodeIdentity(OURS, "n1", NODES).client_context()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
            async with session.get(f"https://{host}:{port}/internal") as get:
                assert get.status == 404
            async with session.post(f"https://{host}:{port}/v1/connect/ca/sign") as post:
                assert post.status == 404
