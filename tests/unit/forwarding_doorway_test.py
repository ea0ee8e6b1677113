from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from caserver.forwarding.doorway import STRANGERS_MAX, Doorway
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring

OURS, THEIRS = (NodeIdentity(Keyring([secret * 32]), "n1", ("n1",)) for secret in (b"o", b"t"))


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"welcome")
        transport.close()


@asynccontextmanager
async def doorway(deadline: float = 5.0) -> AsyncIterator[Doorway]:
    door = Doorway(Echo, context=OURS.server_context(), handshake_deadline=deadline)
    await door.start("127.0.0.1", 0)
    try:
        yield door
    finally:
        await door.close()


async def greeted(door: Doorway, identity: NodeIdentity = OURS) -> bytes:
    host, port = door.address
    reader, writer = await asyncio.open_connection(host, port, ssl=identity.client_context(), server_hostname="")
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.transport.abort()


async def plain(door: Doorway) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*door.address)


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionError:
        return True


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Whatever wants a new descriptor gets EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open("rb") as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_who_shows_a_certificate_of_the_cluster_comes_in() -> None:
    async with doorway() as door:
        assert await greeted(door) == b"welcome"
        with pytest.raises(OSError):
            await greeted(door, THEIRS)
        assert await greeted(door) == b"welcome"


async def test_a_flood_of_strangers_keeps_nobody_out() -> None:
    async with doorway() as door:
        flood = [await plain(door) for _ in range(3 * STRANGERS_MAX)]
        assert await greeted(door) == b"welcome"
        assert door.strangers <= STRANGERS_MAX
        assert await closed(flood[0][0])
        for _, writer in flood:
            writer.transport.abort()


async def test_a_stranger_that_trickles_is_closed_in_time() -> None:
    async with doorway(deadline=0.2) as door:
        reader, writer = await plain(door)
        ended = asyncio.ensure_future(closed(reader))
        for byte in b"\x16\x03\x01\x02\x00\x01" + bytes(200):
            if ended.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert await ended
        writer.transport.abort()


async def test_the_want_of_descriptors_is_a_pause() -> None:
    async with doorway() as door:
        with socket.socket() as waiting:
            waiting.setblocking(False)
            with no_more_descriptors():
                await asyncio.get_running_loop().sock_connect(waiting, door.address)
                await asyncio.sleep(0.25)
        assert await greeted(door) == b"welcome"


async def test_an_address_in_use_is_an_error_and_leaves_nothing_open() -> None:
    async with doorway() as door:
        other = Doorway(Echo, context=OURS.server_context(), handshake_deadline=1)
        with pytest.raises(OSError):
            await other.start(*door.address)
        with pytest.raises(RuntimeError):
            _ = other.address
