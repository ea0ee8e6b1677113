from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import structlog.testing

from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.listening import Limits, Listening
from caserver.unix_socket import UnixSocket
from tests.testkit.descriptors import no_more_descriptors

KEYRING = Keyring([b"k" * 32])
NODES = ("n1", "n2")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Greeting(asyncio.Protocol):
    """Says hello and stays until the client leaves."""

    def __init__(self, left: Callable[[asyncio.BaseProtocol], None]) -> None:
        self._left = left
        self.transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"hello")

    def connection_lost(self, exc: Exception | None) -> None:
        self._left(self)


@asynccontextmanager
async def listening(limits: Limits, *, tls: bool = False) -> AsyncIterator[Listening]:
    served: list[Greeting] = []

    def connection() -> Greeting:
        served.append(Greeting(made.left))
        return served[-1]

    context = NodeIdentity(KEYRING, "n1", NODES).server_context() if tls else None
    made = Listening(("127.0.0.1", 0), connection=connection, limits=limits, tls=context)
    await made.start()
    try:
        yield made
    finally:
        made.close()
        for each in served:
            if each.transport is not None:
                each.transport.close()
        await made.wait_closed()
        await until(lambda: made.count == 0)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - what sockets do has no event to await
            await asyncio.sleep(0.001)


@asynccontextmanager
async def connected(to: Listening, *, source: str = "127.0.0.1", tls: bool = False) -> AsyncIterator[Streams]:
    context = NodeIdentity(KEYRING, "n2", NODES).client_context() if tls else None
    reader, writer = await asyncio.open_connection(
        *to.addresses[0], local_addr=(source, 0), ssl=context, server_hostname="" if tls else None
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        await asyncio.sleep(0)


async def said(to: Listening, *, source: str = "127.0.0.1", tls: bool = False) -> bytes:
    async with connected(to, source=source, tls=tls) as (reader, _):
        return await asyncio.wait_for(reader.read(100), 10)


async def test_beyond_the_limit_connections_are_told_so_and_closed_until_one_leaves() -> None:
    limits = Limits(connections=2, per_client=2, refusal=b"full")
    with structlog.testing.capture_logs() as lines:
        async with listening(limits) as server:
            async with connected(server), connected(server):
                await until(lambda: server.count == 2)
                refused = [await said(server) for _ in range(5)]
            await until(lambda: server.count == 0)
            again = await said(server)

    assert refused == [b"full"] * 5
    assert again == b"hello"
    assert [each["event"] for each in lines] == ["connections_refused"]


async def test_one_client_does_not_take_the_place_of_others() -> None:
    async with listening(Limits(connections=3, per_client=1, refusal=b"full")) as server, connected(server):
        assert await said(server) == b"full"
        assert await said(server, source="127.0.0.2") == b"hello"


async def test_without_a_limit_of_one_client_that_of_all_is_left() -> None:
    async with listening(Limits(connections=2, per_client=0, refusal=b"full")) as server, connected(server):
        await until(lambda: server.count == 1)
        assert await said(server) == b"hello"
        await until(lambda: server.count == 1)
        async with connected(server):
            await until(lambda: server.count == 2)
            assert await said(server) == b"full"


async def test_connections_beyond_the_limit_are_closed_before_their_handshake() -> None:
    async with listening(Limits(connections=1, per_client=9), tls=True) as server, connected(server):
        await until(lambda: server.count == 1)

        assert await said(server) == b""


async def test_silence_instead_of_a_handshake_makes_room_for_who_has_something_to_say() -> None:
    async with listening(Limits(connections=50, per_client=50, handshakes=4), tls=True) as server:
        silent = [socket.create_connection(server.addresses[0]) for _ in range(20)]
        try:
            await until(lambda: server.count == 4)
            greeting = await said(server, tls=True)
        finally:
            for each in silent:
                each.close()

    assert greeting == b"hello"


async def test_a_handshake_has_little_time() -> None:
    limits = Limits(connections=50, per_client=50, handshake_seconds=0.05)
    async with listening(limits, tls=True) as server, connected(server) as (reader, _):
        await until(lambda: server.count == 1)

        assert await asyncio.wait_for(reader.read(), 10) == b""
        await until(lambda: server.count == 0)


async def test_without_descriptors_the_listener_waits_and_says_so_once() -> None:
    defects: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    with structlog.testing.capture_logs() as lines:
        async with listening(Limits(connections=50, per_client=50)) as server:
            client = socket.socket()
            client.setblocking(False)
            with no_more_descriptors():
                await asyncio.get_running_loop().sock_connect(client, server.addresses[0])
                await until(lambda: bool(lines))
                await asyncio.sleep(0.3)
                waiting = server.count
            greeting = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), 10)
            client.close()

    assert (waiting, greeting) == (0, b"hello")
    assert [each["event"] for each in lines] == ["accept_failed"]
    assert defects == []


async def test_an_address_in_use_is_an_error_and_leaves_nothing_open() -> None:
    limits = Limits(connections=1, per_client=1)
    async with listening(limits) as server:
        host, port = server.addresses[0]
        other = Listening((host, port), connection=lambda: Greeting(server.left), limits=limits, tls=None)
        with pytest.raises(OSError, match=f"cannot listen on {host}:{port}: address already in use"):
            await other.start()

        assert other.addresses == []


async def test_a_listener_that_is_closed_at_once_leaves_nothing_open() -> None:
    async with listening(Limits(connections=1, per_client=1)) as server:
        assert len(server.addresses) == 1


# -- Unix sockets, and what changes while it listens


@asynccontextmanager
async def listening_at(path: Path, limits: Limits) -> AsyncIterator[Listening]:
    def connection() -> Greeting:
        return Greeting(made.left)

    made = Listening(UnixSocket(path, mode=0o600), connection=connection, limits=limits, tls=None)
    await made.start()
    try:
        yield made
    finally:
        made.close()
        await made.wait_closed()


async def heard(path: Path) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        return await asyncio.wait_for(reader.read(100), 10)
    finally:
        writer.transport.abort()


async def test_a_unix_socket_is_served_and_gone_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with listening_at(path, Limits(connections=9, per_client=9)) as server:
        greeting, shown = await heard(path), server.shown
        await until(lambda: server.count == 0)

    assert greeting == b"hello"
    assert (shown, server.shown, server.addresses) == ([f"unix://{path}"], [], [])
    assert not path.exists()


async def test_the_limit_of_one_client_holds_for_each_user_of_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with listening_at(path, Limits(connections=9, per_client=1, refusal=b"full")) as server:
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.read(100)
        refused = await heard(path)
        writer.transport.abort()
        await until(lambda: server.count == 0)

        assert (refused, await heard(path)) == (b"full", b"hello")
        await until(lambda: server.count == 0)


async def test_a_path_that_cannot_be_bound_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none" / "s"

    with pytest.raises(OSError, match=f"cannot listen on unix://{path}: no such file or directory"):
        async with listening_at(path, Limits(connections=1, per_client=1)):
            pass


async def test_new_connections_go_by_renewed_limits_and_open_ones_stay() -> None:
    limits = Limits(connections=9, per_client=9, refusal=b"full")
    async with listening(limits) as server, connected(server) as (reader, _):
        server.renew(limits=replace(limits, per_client=1), tls=None)

        assert await said(server) == b"full"
        assert await reader.read(100) == b"hello"


async def test_tls_is_not_turned_on_while_it_listens() -> None:
    limits = Limits(connections=9, per_client=9)
    async with listening(limits) as server:
        with pytest.raises(ValueError, match="cannot change between plain and TLS"):
            server.renew(limits=limits, tls=NodeIdentity(KEYRING, "n1", NODES).server_context())
