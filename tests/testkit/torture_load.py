"""Clients for a cluster in trouble: they change and read the configuration and sign leaves through every node, without a
break, and keep all that they were told. Asyncio in a thread of its own; the faults are made elsewhere meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from caserver.pki.csr import make_csr
from caserver.pki.spiffe import ServiceID
from tests.testkit.cluster import Node
from tests.testkit.history import FOREVER, Kind, Operation
from tests.testkit.invariants import Witness
from tests.testkit.keys import private_key

CONFIGURATION = "/v1/connect/ca/configuration"
CALL_TIMEOUT = 20.0  # seconds; longer than any call may be held
SERVICES = 40
KEY_TYPES = (("ec", 256), ("ec", 384))
FIRST_TTL = 72 * 3600  # seconds; each write sets one more
UNKNOWN = "outcome unknown"
NOT_SENT = 0  # in place of a status: nobody listened
CERTIFICATES_MAX = 80_000  # the ledger keeps 100,000 rows, all of which must be there at the end
WITNESSED = 0.02  # share of the leaves that are held against every bundle; all are held against the last one


@dataclass(frozen=True, slots=True)
class Received:
    """A certificate that a client was given; times are wall clock seconds."""

    leaf: dict[str, Any]
    node: str
    asked: float
    received: float
    relayed_in_trouble: bool  # the node that was asked was paused, killed or cut off meanwhile


@dataclass(frozen=True, slots=True)
class Trouble:
    """A call that did not end with 200."""

    node: str
    what: str
    why: str
    excused: bool


@dataclass(slots=True)
class Disturbance:
    node: str
    began: float
    ended: float = FOREVER


@dataclass(slots=True)
class Records:
    """What came of it."""

    history: list[Operation] = field(default_factory=list)
    default_reads: list[Operation] = field(default_factory=list)
    stale_reads: int = 0
    received: list[Received] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # invariants that did not hold
    calls: Counter[str] = field(default_factory=Counter)


class TortureLoad:
    """Use as a context manager."""

    def __init__(
        self, nodes: Sequence[Node], witness: Witness, *, trust_domain: str, seed: int, rotations: int, pause: float
    ) -> None:
        self.records = Records()
        self._nodes = nodes
        self.witness = witness
        self._chance = random.Random(seed)
        self._rotations_left = rotations
        self._pause = pause  # seconds between two calls of one client, on average
        self._csrs = [
            make_csr(private_key("ec-256"), ServiceID(trust_domain, "dc1", f"tortured-{number}").uri)
            for number in range(SERVICES)
        ]
        self._numbers = itertools.count(1)
        self._key_type = 0
        self._disturbances: list[Disturbance] = []
        self._loop = asyncio.new_event_loop()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let every client finish its call."""
        self._ended.set()
        self._thread.join()

    @contextmanager
    def disturbed(self, nodes: Sequence[Node]) -> Iterator[None]:
        """Clients of these nodes may see errors meanwhile."""
        marks = [Disturbance(node.name, time.monotonic()) for node in nodes]
        self._disturbances.extend(marks)
        try:
            yield
        finally:
            for mark in marks:
                mark.ended = time.monotonic()

    def write_through(self, node: Node, *, within: float = CALL_TIMEOUT) -> float | None:
        """Change the configuration once more, now; the seconds that it took, None if it was refused."""
        began = time.monotonic()
        done = asyncio.run_coroutine_threadsafe(self._probe(node, within), self._loop).result()
        return time.monotonic() - began if done else None

    async def _probe(self, node: Node, within: float) -> bool:
        timeout = aiohttp.ClientTimeout(total=within)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            session._retry_connection = False
            return await _Client(self, node, session).write(None)

    async def _main(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as clients,
        ):
            session._retry_connection = False  # a write that is sent twice in secret is not what the history says
            for node in self._nodes:
                client = _Client(self, node, session)
                for step in (client.configure, client.look, client.read_roots, client.sign, client.sign):
                    clients.create_task(self._repeat(step))

    async def _repeat(self, step: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        while not self._ended.is_set():
            await step()
            await asyncio.sleep(self._chance.uniform(0, 2 * self._pause))

    def next_value(self) -> str:
        """A LeafCertTTL that was never written before."""
        return f"{FIRST_TTL + next(self._numbers)}s"

    def key_type(self) -> tuple[str, int]:
        """The root key to ask for; another one now and then, which rotates the root."""
        if self._rotations_left and self._chance.random() < 0.01:
            self._rotations_left -= 1
            self._key_type ^= 1
        return KEY_TYPES[self._key_type]

    def chance(self) -> random.Random:
        return self._chance

    def csr(self) -> str:
        return self._chance.choice(self._csrs)

    def saw(self, received: Received) -> None:
        self.records.received.append(received)
        if self._chance.random() < WITNESSED:
            self.witness.saw_leaf(received.leaf)

    def saw_roots(self, node: Node, roots: dict[str, Any], index: int, *, known: int) -> None:
        try:
            self.witness.saw_roots(node, roots, index, known=known)
        except AssertionError as exc:
            self.records.broken.append(str(exc))

    def complain(self, node: Node, what: str, why: str, began: float) -> None:
        """Note a failed call; excused if its node was disturbed at any time while it was under way."""
        self.records.troubles.append(Trouble(node.name, what, why[:160], excused=self.in_trouble(node, began)))

    def in_trouble(self, node: Node, since: float) -> bool:
        """Whether the node was disturbed at any time since then (monotonic)."""
        return any(mark.node == node.name and mark.ended >= since for mark in self._disturbances)


class _Client:
    """Calls through one node."""

    def __init__(self, load: TortureLoad, node: Node, session: aiohttp.ClientSession) -> None:
        self._load = load
        self._node = node
        self._session = session
        self._known: tuple[str, int] | None = None  # value and index of the newest configuration read here

    async def _call(self, what: str, method: str, path: str, body: str | None = None) -> tuple[int, str, int] | None:
        """Status, text and X-Consul-Index; None if there was no answer."""
        self._load.records.calls[what] += 1
        began = time.monotonic()
        try:
            async with self._session.request(method, self._node.url + path, data=body) as response:
                text = await response.text()
                index = int(response.headers.get("X-Consul-Index", 0))
        except aiohttp.ClientConnectorError as exc:
            self._load.complain(self._node, what, type(exc).__name__, began)
            return NOT_SENT, "", 0
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            self._load.complain(self._node, what, type(exc).__name__, began)
            return None
        if response.status not in {200, 409}:
            self._load.complain(self._node, what, f"{response.status} {text}", began)
        return response.status, text, index

    async def configure(self) -> None:
        """Read or write or compare-and-set."""
        chance = self._load.chance()
        if self._known is None or chance.random() < 0.6:
            await self.look()
        elif chance.random() < 0.5:
            await self.write(None)
        else:
            await self.write(self._known)

    async def look(self) -> None:
        """A read; also by a client that never writes, so that no held write keeps a node that is cut off from telling."""
        await self.read(self._load.chance().choice(["", "consistent", "consistent", "stale"]))

    async def read(self, mode: str) -> None:
        invoked = time.monotonic()
        answer = await self._call("read", "GET", f"{CONFIGURATION}?{mode}")
        if answer is None or answer[0] != 200:
            return
        document = json.loads(answer[1])
        value = document["Config"]["LeafCertTTL"]
        self._known = value, document["ModifyIndex"]
        records = self._load.records
        who = f"{self._node.name} {mode or 'default'} index {document['ModifyIndex']}"
        operation = Operation(Kind.READ, invoked, time.monotonic(), value=value, who=who)
        if mode == "stale":
            records.stale_reads += 1
        else:
            (records.history if mode else records.default_reads).append(operation)

    async def write(self, expected: tuple[str, int] | None) -> bool:
        """A write, or a compare-and-set on what was ``expected`` (value, index)."""
        value = self._load.next_value()
        key_type, bits = self._load.key_type()
        config = {"CSRMaxPerSecond": 0, "LeafCertTTL": value, "PrivateKeyType": key_type, "PrivateKeyBits": bits}
        query = "" if expected is None else f"?cas={expected[1]}"
        kind = Kind.WRITE if expected is None else Kind.CAS
        invoked = time.monotonic()
        body = json.dumps({"Provider": "consul", "Config": config})
        answer = await self._call(kind.value, "PUT", CONFIGURATION + query, body)
        wanted = None if expected is None else expected[0]
        operation = Operation(kind, invoked, time.monotonic(), value, wanted, self._node.name)
        if (kept := _kept(operation, answer)) is not None:
            self._load.records.history.append(kept)
        return answer is not None and answer[0] == 200

    async def read_roots(self) -> None:
        known = self._load.witness.index_known_to(self._node)
        answer = await self._call("roots", "GET", "/v1/connect/ca/roots")
        if answer is not None and answer[0] == 200:
            self._load.saw_roots(self._node, json.loads(answer[1]), answer[2], known=known)

    async def sign(self) -> None:
        if len(self._load.records.received) >= CERTIFICATES_MAX:
            return
        asked, since = time.time(), time.monotonic()
        answer = await self._call("sign", "PUT", "/v1/connect/ca/sign", self._load.csr())
        if answer is not None and answer[0] == 200:
            excused = self._load.in_trouble(self._node, since)
            self._load.saw(Received(json.loads(answer[1]), self._node.name, asked, time.time(), excused))


def _kept(operation: Operation, answer: tuple[int, str, int] | None) -> Operation | None:
    """What the history keeps of a write; None if it certainly had no effect, by the node's word."""
    if answer is None or UNKNOWN in answer[1]:
        return Operation(
            operation.kind, operation.invoked, math.inf, operation.value, operation.expected, operation.who
        )
    if answer[0] == 200:
        return operation
    if answer[0] == 409 and operation.kind is Kind.CAS:
        return Operation(Kind.REFUSED, operation.invoked, operation.returned, None, operation.expected, operation.who)
    return None
