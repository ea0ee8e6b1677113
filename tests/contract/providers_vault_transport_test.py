"""A server (or a proxy before it) that answers without end holds no thread of the pool, and nobody else up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from caserver.environment import SystemClock, ThreadWorkers
from caserver.errors import ProviderUnavailable
from caserver.fields import Secret
from caserver.providers.vault.endpoint import Endpoint
from caserver.providers.vault.session import Answer, VaultSession
from tests.testkit.odd_servers import GOOD, OK, Script, dripping, flooding, read_request, saying, serving
from tests.testkit.web_certs import WebCA

SHORT = 0.2  # seconds, for calls that are to fail
LONG = 60.0  # for those that are not
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status line": dripping(b"HTTP/1.1 200 ", b"O"),
    "headers": dripping(OK + b"X: ", b"x"),
    "many headers": dripping(OK, b"X: x\r\n"),
    "preliminary answers": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": dripping(OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "body without a length": dripping(OK + b"Connection: close\r\n\r\n", b"x"),
    "chunks": dripping(CHUNKED, b"1\r\nx\r\n"),
    "chunk extension": dripping(CHUNKED + b"1;", b"x"),
    "body of a redirect": dripping(b"HTTP/1.1 307 X\r\nLocation: /\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    "TLS handshake": dripping(b"\x16\x03\x03\x40\x00\x02", b"\x00"),
}


@asynccontextmanager
async def sessions(workers: ThreadWorkers) -> AsyncIterator[Callable[..., VaultSession]]:
    """Opens sessions of one pool of threads."""
    opened: list[VaultSession] = []

    def session(address: str, *, pool_size: int = 1, **options: object) -> VaultSession:
        endpoint = Endpoint(address, token=Secret("s.sesame"), **options)  # type: ignore[arg-type]  # whatever a test needs
        opened.append(VaultSession(endpoint, clock=SystemClock(), workers=workers, pool_size=pool_size))
        return opened[-1]

    try:
        yield session
    finally:
        for each in opened:
            each.close()


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    made = ThreadWorkers(len(DRIPS))
    yield made
    made.close()


async def all_at_once(session: Callable[..., VaultSession], count: int) -> list[Answer]:
    """Calls that are answered only when all of them have arrived: each needs a thread of its own."""
    together = threading.Barrier(count)

    def script(connection: socket.socket, _: threading.Event) -> None:
        read_request(connection)
        together.wait(LONG)
        connection.sendall(GOOD)

    with serving(script) as address:
        good = session(address, pool_size=count)
        return await asyncio.gather(*(good.call("get", "x", deadline=LONG) for _ in range(count)))


async def test_who_drips_gives_every_thread_back_and_the_others_go_on(workers: ThreadWorkers) -> None:
    with contextlib.ExitStack() as servers:
        async with sessions(workers) as session:
            slow = []
            for name, script in DRIPS.items():
                address = servers.enter_context(serving(script))
                slow.append(session(address.replace("http:", "https:") if name.startswith("TLS") else address))
            calls = (each.call("get", "x", deadline=SHORT) for each in slow)
            told = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in told] == [ProviderUnavailable] * len(DRIPS)
            answers = await all_at_once(session, len(DRIPS))  # while all of them are dripping still
    assert all(answer.ok for answer in answers)


async def test_a_batch_to_who_drips_gives_every_thread_back(workers: ThreadWorkers) -> None:
    with serving(DRIPS["body"]) as address:
        async with sessions(workers) as session:
            slow = session(address, pool_size=len(DRIPS))
            outcomes = await slow.post_all("x", [{}] * 3 * len(DRIPS), namespace=None, deadline=SHORT)
            assert {type(each) for each in outcomes} == {ProviderUnavailable}
            assert all(answer.ok for answer in await all_at_once(session, len(DRIPS)))


async def test_who_drips_through_tls_gives_the_thread_back(workers: ThreadWorkers, tmp_path: Path) -> None:
    authority = WebCA(tmp_path)
    pair = authority.issue("server")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(pair.cert, pair.key)
    with contextlib.ExitStack() as servers:
        async with sessions(workers) as session:
            scripts = [DRIPS["headers"], DRIPS["body"]] * (len(DRIPS) // 2)
            addresses = [servers.enter_context(serving(script, tls)) for script in scripts]
            slow = [session(address, ca_file=authority.file) for address in addresses]
            calls = [each.call("get", "x", deadline=SHORT) for each in slow]
            told = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in told] == [ProviderUnavailable] * len(told)
            assert all(answer.ok for answer in await all_at_once(session, len(DRIPS)))
            with serving(saying(GOOD), tls) as address:
                answer = await session(address, ca_file=authority.file).call("get", "x", deadline=LONG)
                assert answer.data == {"x": "y"}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (flooding(OK + b"Connection: close\r\n\r\n"), "sends more than 8 MiB"),
        (flooding(b"HTTP/1.1 307 X\r\nLocation: /\r\nConnection: close\r\n\r\n"), "sends more than 8 MiB"),
        (saying(OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"), "compresses"),
    ],
    ids=["an answer", "a redirect", "what could become anything"],
)
async def test_an_answer_beyond_measure_is_given_up(workers: ThreadWorkers, script: Script, told: str) -> None:
    with serving(script) as address:
        async with sessions(workers) as session:
            for _ in range(3):  # more often than it has connections
                with pytest.raises(ProviderUnavailable, match=told):
                    await session(address).call("get", "x", deadline=LONG)


async def test_a_session_is_as_good_as_before_once_the_server_is(workers: ThreadWorkers) -> None:
    scripts = iter([DRIPS["body"], flooding(OK + b"\r\n"), saying(OK + b"Content-Encoding: br\r\n\r\n"), saying(GOOD)])

    def script(connection: socket.socket, over: threading.Event) -> None:
        next(scripts)(connection, over)

    with serving(script) as address:
        async with sessions(workers) as session:
            one = session(address)
            for deadline in (SHORT, LONG, LONG):
                with pytest.raises(ProviderUnavailable):
                    await one.call("get", "x", deadline=deadline)
            assert (await one.call("get", "x", deadline=LONG)).data == {"x": "y"}
