"""What one client may hold of a server: bytes that nobody reads, heads that do not end, answers that it does not take."""

from __future__ import annotations

import asyncio
import gc
import gzip
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from caserver.api.connection import AHEAD_MAX, HEAD_MAX, PIECE, READ_BUFFER, Connection
from caserver.api.server import DOUBTFUL_BODIES, ApiServer, Listener
from tests.contract.world import World, closed, parsed, running
from tests.testkit.acl_world import MASTER, UNKNOWN, guarded
from tests.testkit.web_certs import WebCA, client_context

KIB = 1024
LIVE = b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
SIGN = "/v1/connect/ca/sign"
CROWD = 40
# What one connection may hold: of a body, behind a request, in the parser; and all that belongs to a connection besides.
SHARE = 2 * READ_BUFFER + AHEAD_MAX + 3 * PIECE + 32 * KIB


async def serve(world: World, **options: float) -> None:
    """Put a server with other settings in place."""
    await world.server.close()
    world.server = ApiServer(world.node, [Listener("127.0.0.1", 0)], **options)  # type: ignore[arg-type]
    await world.server.start()


async def until(condition: object) -> None:
    """Wait for what the sockets of this process do."""
    assert callable(condition)
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def resting(world: World) -> list[bool]:
    """Of every connection whether the server has stopped to read from it."""
    assert world.server._http is not None
    transports = [each.transport for each in world.server._http.connections]
    return [transport is None or not transport.is_reading() for transport in transports]


async def push(connection: socket.socket, head: bytes, endless: bytes, size: int) -> None:
    """Send as much as is taken."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, head)
    for _ in range(size // len(endless)):
        await loop.sock_sendall(connection, endless)


@asynccontextmanager
async def crowd(world: World, head: bytes, endless: bytes, size: int = 500 * KIB) -> AsyncIterator[list[socket.socket]]:
    """Connections that push until the server rests from all of them."""
    host, port = world.server.addresses[0]
    connections = []
    pushing = []
    for _ in range(CROWD):
        connection = socket.create_connection((host, port))
        connection.setblocking(False)
        connections.append(connection)
        pushing.append(asyncio.ensure_future(push(connection, head, endless, size)))
    try:
        await until(lambda: len(resting(world)) == CROWD and all(resting(world)))
        yield connections
    finally:
        for each in pushing:
            each.cancel()
        await asyncio.gather(*pushing, return_exceptions=True)
        for connection in connections:
            connection.close()


async def traced(world: World, head: bytes, endless: bytes, size: int = 500 * KIB) -> int:
    """Bytes that the process holds more, per connection of a crowd."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        async with crowd(world, head, endless, size):
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        return (after - before) // CROWD
    finally:
        tracemalloc.stop()


def asked(path: str, *lines: str, method: str = "PUT") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *lines, "", "")).encode()


LONG = ("Content-Length: 512000",)
CHUNKED = ("Transfer-Encoding: chunked",)
LARGE_HEAD = asked("/v1/status/live", *(f"X-Field: {'x' * 4000}",) * 7, method="GET")
SMALL_CHUNKS = b"1\r\nx\r\n" * 1000


@pytest.mark.parametrize(
    ("lines", "endless"), [(LONG, b"x" * 4000), (CHUNKED, SMALL_CHUNKS)], ids=["length", "small chunks"]
)
async def test_a_stranger_who_waits_for_its_turn_leaves_little_behind(lines: tuple[str, ...], endless: bytes) -> None:
    async with guarded() as world:
        await serve(world, strangers_per_second=0.001)
        for _ in range(20):  # those who may begin at once
            await world.fetch("GET", "/v1/status/live")

        assert await traced(world, asked(SIGN, *lines), endless) < SHARE


async def test_who_will_be_refused_leaves_little_behind_before_its_body_is_wanted() -> None:
    async with guarded() as world:
        first = [await asyncio.open_connection(*world.server.addresses[0]) for _ in range(DOUBTFUL_BODIES)]
        for reader, writer in first:
            writer.write(asked(SIGN, f"X-Consul-Token: {UNKNOWN}", "Expect: 100-continue", *LONG))
            assert b" 100 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        host, port = world.server.addresses[0]
        connection = socket.create_connection((host, port))
        connection.setblocking(False)
        pushing = asyncio.ensure_future(push(connection, asked(SIGN, *LONG), b"x" * 4000, 500 * KIB))
        await until(lambda: any(resting(world)))

        assert sum(resting(world)) == 1
        pushing.cancel()
        connection.close()
        for _, writer in first:
            await closed(writer)


@pytest.mark.parametrize(
    ("endless", "size"), [(LIVE * 30, 1000 * KIB), (LARGE_HEAD, 2000 * KIB)], ids=["many", "large"]
)
async def test_what_follows_a_request_under_way_leaves_little_behind(endless: bytes, size: int) -> None:
    async with running() as world:
        index = (await world.fetch("GET", "/v1/connect/ca/roots")).headers["X-Consul-Index"]
        waiting = asked(f"/v1/connect/ca/roots?index={index}", method="GET")

        assert await traced(world, waiting, endless, size) < SHARE


async def over_tls(world: World, directory: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to an HTTPS server that takes the place of the other."""
    ca = WebCA(directory)
    pair = ca.issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    await world.server.close()
    world.server = ApiServer(world.node, [Listener("127.0.0.1", 0, context)])
    await world.server.start()
    address = world.server.addresses[0]
    return await asyncio.open_connection(*address, ssl=client_context(ca.file), server_hostname="localhost")


async def test_over_tls_each_request_is_answered_when_it_comes(tmp_path: Path) -> None:
    async with running(dev=False) as world:
        reader, writer = await over_tls(world, tmp_path)
        for size in (0, 5, 0, 40000, 0, 0, 300000, 5, 0):
            body = b"x" * size
            writer.write((asked(SIGN, f"Content-Length: {size}") + body) if size else LIVE)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            (length,) = [int(line[16:]) for line in answer.split(b"\r\n") if line.startswith(b"Content-Length: ")]
            await asyncio.wait_for(reader.readexactly(length), 10)
            assert answer.startswith(b"HTTP/1.1 400 " if size else b"HTTP/1.1 200 ")
        writer.write(LIVE * 100 + asked("/openapi.json", "Connection: close", method="GET"))
        answers = await asyncio.wait_for(reader.read(), 10)
        await closed(writer)

    assert answers.count(b"HTTP/1.1 200 ") == 101


async def test_over_tls_no_more_is_taken_in_either(tmp_path: Path) -> None:
    async with running() as world:
        _, writer = await over_tls(world, tmp_path)
        assert world.server._http is not None
        writer.write(asked("/v1/connect/ca/roots?index=1000000", method="GET") + LIVE * 50000)
        await until(lambda: any(resting(world)))
        (transport,) = [each.transport for each in world.server._http.connections]
        assert transport is not None
        held = 0
        for _ in range(200):  # turns of the loop, each of which could take in some of what waits
            await asyncio.sleep(0)
            held = max(held, transport.get_read_buffer_size())  # type: ignore[attr-defined]
        writer.transport.abort()
        await closed(writer)

    assert PIECE / 2 < held < 4 * PIECE


async def test_a_head_that_does_not_end_is_cut() -> None:
    field = b"X-Field: " + b"x" * 4000 + b"\r\n"
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n" + field * (HEAD_MAX // len(field) - 2) + b"\r\n")
        within = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        await closed(writer)
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n" + field * 40)
        beyond = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        await closed(writer)

    assert within.startswith(b"HTTP/1.1 200 ")
    assert beyond.startswith(b"HTTP/1.1 431 ")
    assert b"Connection: close" in beyond


@pytest.mark.parametrize(
    "overhead",
    [
        b"1;" + b"x" * 4000 + b"\r\nx\r\n",
        b"1\r\nx\r\n0\r\n" + b"X-Trailer: " + b"x" * 4000 + b"\r\n",
        b"1\r\nx\r\n" * 500,
    ],
    ids=["extensions", "trailers", "tiny chunks"],
)
async def test_a_body_that_is_mostly_no_body_is_cut(overhead: bytes) -> None:
    trailer = overhead[overhead.find(b"X-Trailer") :] if b"X-Trailer" in overhead else overhead
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked(SIGN, *CHUNKED) + overhead)
        answering = asyncio.ensure_future(reader.read())
        with suppress(ConnectionError):
            while not answering.done():
                writer.write(trailer)
                await writer.drain()
                await asyncio.sleep(0.001)
        (ended,) = await asyncio.gather(answering, return_exceptions=True)
        await closed(writer)

    # Who does not stop to send may find the connection reset before it reads why.
    assert isinstance(ended, ConnectionError) or (isinstance(ended, bytes) and ended.startswith(b"HTTP/1.1 400 "))
    assert not world.node.requests[SIGN, "PUT", 200]
    assert world.node.requests[SIGN, "PUT", 400] == 1


async def test_requests_sent_ahead_are_answered_one_after_the_other() -> None:
    body = b"no request"
    put = asked(SIGN, f"Content-Length: {len(body)}") + body
    async with running(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write((LIVE * 50 + put) * 20 + LAST)
        answers = await asyncio.wait_for(reader.read(), 30)
        await closed(writer)

    assert answers.count(b"HTTP/1.1 200 OK") == 1001
    assert answers.count(b"HTTP/1.1 400 ") == 20
    assert answers.endswith(b'{"Live":true}')


@pytest.mark.parametrize("pause", [1, 7, 400])
async def test_a_request_may_come_in_parts(pause: int) -> None:
    body = b"x" * 300
    whole = asked(SIGN, f"Content-Length: {len(body)}") + body + asked(SIGN, *CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n" + LAST
    async with running(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        for start in range(0, len(whole), pause):
            writer.write(whole[start : start + pause])
            await writer.drain()
            await asyncio.sleep(0)
        answers = await asyncio.wait_for(reader.read(), 30)
        await closed(writer)

    assert (answers.count(b"HTTP/1.1 400 "), answers.count(b"HTTP/1.1 200 ")) == (2, 1)


@pytest.mark.parametrize("size", [100, 700, 3000])
async def test_what_comes_at_any_moment_is_taken_in_its_order(size: int) -> None:
    body = b"x" * 2999
    put = asked(SIGN, f"Content-Length: {len(body)}") + body
    whole = (LIVE * 2 + put) * 20 + LAST
    async with running(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        await until(lambda: world.server._http is not None and world.server._http.connections)
        assert world.server._http is not None
        (connection,) = world.server._http.connections
        assert isinstance(connection, Connection)
        for start in range(0, len(whole), size):  # a piece in every turn of the loop, if the connection does not rest
            await until(lambda: connection.transport is None or connection.transport.is_reading())
            piece = whole[start : start + size]
            connection.get_buffer(-1)[: len(piece)] = piece
            connection.buffer_updated(len(piece))
            await asyncio.sleep(0)
        answers = await asyncio.wait_for(reader.read(), 30)
        await closed(writer)

    assert (answers.count(b"HTTP/1.1 200 "), answers.count(b"HTTP/1.1 400 ")) == (41, 20)
    assert answers.endswith(b'{"Live":true}')


async def test_many_requests_that_are_sent_ahead_with_small_bodies_are_all_answered() -> None:
    body = gzip.compress(b"x" * 3000)
    put = asked(SIGN, "Content-Encoding: gzip", f"Content-Length: {len(body)}") + body
    async with running(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write((put * 3 + LIVE) * 500 + LAST)
        answers = await asyncio.wait_for(reader.read(), 30)
        await closed(writer)

    assert (answers.count(b"HTTP/1.1 200 "), answers.count(b"HTTP/1.1 400 ")) == (501, 1500)


async def test_a_large_body_behind_another_request_arrives() -> None:
    body = b'{"CSR": "' + b"x" * (500 * KIB) + b'"}'
    async with running(dev=False) as world:
        index = (await world.fetch("GET", "/v1/connect/ca/roots")).headers["X-Consul-Index"]
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked(f"/v1/connect/ca/roots?index={index}&wait=10s", method="GET"))
        writer.write(asked(SIGN, f"Content-Length: {len(body)}") + body + LAST)
        await until(lambda: world.node.blocked.count)
        await world.clock.advance(20.0)
        answers = await asyncio.wait_for(reader.read(), 30)
        await closed(writer)

    assert [answers.count(b"HTTP/1.1 %d " % status) for status in (200, 400)] == [2, 1]


# -- answers before the body


async def test_who_is_refused_reads_why_although_it_goes_on_sending() -> None:
    async with guarded() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked("/v1/agent/reload", "Content-Length: 50000000"))
        sent = 0
        try:
            for _ in range(50):
                writer.write(b"x" * 1000000)
                sent += 1
                await asyncio.wait_for(writer.drain(), 1)
        except (TimeoutError, ConnectionError):
            pass
        answer = parsed(await asyncio.wait_for(reader.read(), 10))
        await closed(writer)

    assert (answer.status, answer.text, answer.headers["Connection"]) == (403, "Permission denied", "close")
    assert sent < 50


async def test_who_asked_first_is_refused_without_its_body() -> None:
    async with guarded() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked("/v1/agent/reload", "Expect: 100-continue", "Content-Length: 100"))
        answer = parsed(await asyncio.wait_for(reader.read(), 10))
        await closed(writer)

    assert (answer.status, answer.headers["Connection"]) == (403, "close")


async def test_a_body_that_is_too_large_by_its_own_word_waits_for_nothing() -> None:
    async with guarded() as world:
        first = [await asyncio.open_connection(*world.server.addresses[0]) for _ in range(DOUBTFUL_BODIES)]
        for reader, writer in first:
            writer.write(asked(SIGN, "Expect: 100-continue", *LONG))
            assert b" 100 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked(SIGN, "Expect: 100-continue", "Content-Length: 600000"))
        answer = parsed(await asyncio.wait_for(reader.read(), 10))
        await closed(writer)
        for _, writer in first:
            await closed(writer)

    assert answer.status == 413


async def test_a_connection_survives_a_small_body_that_nobody_wanted() -> None:
    async with guarded(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked("/v1/agent/reload", "Content-Length: 30000"))
        refused = await asyncio.wait_for(reader.readuntil(b"Permission denied"), 10)
        writer.write(b"x" * 30000)
        writer.write(asked("/v1/agent/reload", f"X-Consul-Token: {MASTER}", "Content-Length: 0") + LAST)
        answers = await asyncio.wait_for(reader.read(), 10)
        await closed(writer)

    assert b"Connection: close" not in refused
    assert answers.count(b"HTTP/1.1 200 ") == 2


# -- clients that do not read


async def test_an_answer_that_nobody_reads_ends_its_connection() -> None:
    async with running() as world:
        await serve(world, idle_deadline=0.2)
        assert world.server._http is not None
        (served,) = world.server._http.served
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(world.server.addresses[0])
        connection.setblocking(False)
        numbers = count()
        ask = asked("/openapi.json", method="GET")
        loop = asyncio.get_running_loop()

        async def ask_on() -> None:
            while True:
                next(numbers)
                await loop.sock_sendall(connection, ask)

        asking = asyncio.ensure_future(ask_on())
        await until(lambda: served.listening.count == 1)
        await until(lambda: served.listening.count == 0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        connection.close()
        answered = await world.fetch("GET", "/v1/status/live")

    assert answered.status == 200
    assert world.node.requests["/openapi.json", "GET", 200] < next(numbers)


# -- what two readers could take for different things

AMBIGUOUS = {
    "both lengths": ["Content-Length: 5", "Transfer-Encoding: chunked"],
    "two lengths": ["Content-Length: 5", "Content-Length: 6"],
    "the same length twice": ["Content-Length: 5", "Content-Length: 5"],
    "a list of lengths": ["Content-Length: 5, 5"],
    "a signed length": ["Content-Length: +5"],
    "a negative length": ["Content-Length: -1"],
    "a length in hex": ["Content-Length: 0x5"],
    "a length with blanks": ["Content-Length: 5 5"],
    "a huge length": ["Content-Length: 99999999999999999999999"],
    "an empty length": ["Content-Length: "],
    "two encodings": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    "not chunked at the end": ["Transfer-Encoding: chunked, identity"],
    "an unknown encoding": ["Transfer-Encoding: xchunked"],
    "a quoted encoding": ['Transfer-Encoding: "chunked"'],
    "a blank before the colon": ["Transfer-Encoding : chunked"],
    "a folded line": ["X-A: b", " Transfer-Encoding: chunked"],
    "a bare return": ["X-A: b\rTransfer-Encoding: chunked"],
    "a zero byte": ["X-A: b\0c"],
    "two hosts": ["Host: y"],
}
HIDDEN = b"0\r\n\r\nGET /v1/status/leader HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("lines", AMBIGUOUS.values(), ids=AMBIGUOUS)
async def test_a_request_of_two_meanings_has_none(lines: list[str]) -> None:
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked(SIGN, *lines) + HIDDEN)
        answers = await asyncio.wait_for(reader.read(), 10)
        await closed(writer)

    assert answers.split(b" ")[1] == b"400"
    assert answers.count(b"HTTP/1.") == 1
    assert not world.node.requests["/v1/status/leader", "GET", 200]


BROKEN_CHUNKS = {
    "a size that is none": b"zz\r\nhello\r\n0\r\n\r\n",
    "a signed size": b"+5\r\nhello\r\n0\r\n\r\n",
    "a size in C": b"0x5\r\nhello\r\n0\r\n\r\n",
    "a size of a size": b"ffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "more than it says": b"3\r\nhello\r\n0\r\n\r\n",
    "a bare newline": b"5\nhello\n0\n\n",
    "a blank before the size": b" 5\r\nhello\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("late", [False, True], ids=["with its head", "late"])
@pytest.mark.parametrize("body", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
async def test_a_body_in_broken_chunks_is_no_request(body: bytes, late: bool) -> None:
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(asked(SIGN, *CHUNKED, *(["Expect: 100-continue"] if late else [])))
        if late:
            assert b" 100 " in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.write(body + b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\n\r\n")
        answers = await asyncio.wait_for(reader.read(), 10)
        await closed(writer)

    assert answers.split(b" ")[1] == b"400"
    assert answers.count(b"HTTP/1.") == 1
    assert not world.node.requests["/v1/status/leader", "GET", 200]


@pytest.mark.parametrize(
    "first",
    [
        asked("/v1/status/live", "Content-Length: 5", method="HEAD") + b"hello",
        asked("/v1/status/live", "Content-Length: 5", method="GET") + b"hello",
        asked("/v1/status/live", "Content-Length: 5", method="OPTIONS") + b"hello",
        asked("/v1/nope", *CHUNKED, method="DELETE") + b"5\r\nhello\r\n0\r\nX-Trailer: x\r\n\r\n",
        asked("/v1/status/live", "Connection: Upgrade", "Upgrade: websocket", method="GET"),
    ],
    ids=["HEAD", "GET", "OPTIONS", "DELETE", "websocket"],
)
async def test_a_body_belongs_to_its_request_even_where_it_means_nothing(first: bytes) -> None:
    async with running(dev=False) as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(first + LAST)
        answers = await asyncio.wait_for(reader.read(), 10)
        await closed(writer)

    assert answers.count(b"HTTP/1.1") == 2
    assert answers.endswith(b'{"Live":true}')
