"""One node's public interface on a loopback port, over the real authority on a log in this process."""

from __future__ import annotations

import asyncio
import base64
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from caserver.api.metrics import Telemetry
from caserver.api.server import ApiServer, Listener, NodeView, Readiness
from caserver.authority.authority import Authority
from caserver.authority.operations import Operations
from caserver.authority.ports import Providers
from caserver.backup import Backups
from caserver.config.acl_settings import ACLSettings
from caserver.config.agent_config import AgentConfig
from caserver.environment import InlineWorkers
from caserver.errors import CaserverError, ReloadFailed
from caserver.forwarding.leader import Leader
from caserver.internode.keyring import Keyring
from caserver.leaf_cache import LeafCache
from caserver.node_gate import NodeGate
from caserver.providers.builtin import builtin_kind
from caserver.requests import decode_request, encode_answer
from caserver.state.configuration import parse_bootstrap
from tests.testkit.access import OFF, Access, access
from tests.testkit.fakes import FakeLog, FakeRaft, ManualClock, SeededEntropy, settle

CLUSTER_ID = "838f036d-2872-2c69-9558-34f8baacf38a"
KEYRING = Keyring([bytes(range(32))])
START = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
KEYRING = Keyring([bytes(range(32))])
PEERS = {"n1": ("127.0.0.1", 18611), "n2": ("127.0.0.1", 18621), "n3": ("127.0.0.1", 18631)}


@dataclass
class Answered:
    """One HTTP answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body, unzipped if need be."""
        plain = self.body
        if self.headers.get("Content-Encoding") == "gzip":
            plain = zlib.decompress(self.body, wbits=31)
        return plain.decode()


class LocalHop:
    """Carries frames to the authority of the leading node, in this process."""

    def __init__(self) -> None:
        self.operations: dict[str, Operations] = {}
        self.sent = 0
        self.before: Callable[[], object] = lambda: None  # called before each frame

    async def send(self, node: str, frame: bytes, deadline: float) -> bytes:
        self.sent += 1
        self.before()
        caller, request = decode_request(frame)
        try:
            return encode_answer(await self.operations[node].execute(caller, request))
        except CaserverError as exc:
            return encode_answer(exc)


@dataclass
class Reloads:
    """Counts what it is asked for, and fails if it is told to."""

    count: int = 0
    fault: ReloadFailed | None = None

    async def reload(self) -> None:
        self.count += 1
        if self.fault is not None:
            raise self.fault


@dataclass
class World:
    """What a test can reach."""

    log: FakeLog  # of the node under test
    clock: ManualClock
    server: ApiServer  # a test that puts another in its place closes the first
    node: NodeView
    hop: LocalHop
    rafts: dict[str, FakeRaft]
    reloads: Reloads
    accesses: dict[str, Access]

    async def fetch(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"", *, advance: float = 0.0
    ) -> Answered:
        """One request on a connection of its own; ``advance`` is the virtual time that may pass meanwhile, seconds."""
        host, port = self.server.addresses[0]
        lines = {"Host": f"{host}:{port}", "Connection": "close"} | (headers or {})
        if body or method in {"PUT", "POST"}:
            lines["Content-Length"] = str(len(body))
        head = (
            f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        )
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(head.encode() + body)
        exchange = asyncio.ensure_future(reader.read())
        passed = 0.0
        while not exchange.done() and passed < advance:
            await asyncio.wait((exchange,), timeout=0.005)
            await self.clock.advance(0.25)
            passed += 0.25
        try:
            return parsed(await asyncio.wait_for(exchange, 10))
        finally:
            await closed(writer)


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close one connection and wait until it is."""
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def parsed(raw: bytes) -> Answered:
    """Take an HTTP/1.1 answer apart; header names as they were sent."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status_line, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return Answered(int(status_line.split(" ")[1]), headers, body)


@asynccontextmanager
async def running(
    *,
    dev: bool = True,
    enabled: bool = True,
    node: str = "n1",
    leader: str = "n1",
    cluster_id: str = CLUSTER_ID,
    config: dict[str, object] | None = None,
    acl: ACLSettings = OFF,
) -> AsyncIterator[World]:
    """A node called ``node`` in a cluster that ``leader`` leads, its CA initialized (if Connect is enabled)."""
    clock, entropy, hop = ManualClock(START), SeededEntropy(), LocalHop()
    lead = FakeLog(leader)
    log = lead if lead.node == node else lead.elsewhere(node)
    tasks = []
    rafts: dict[str, FakeRaft] = {}
    accesses: dict[str, Access] = {}
    for each in {lead, log}:
        each.links = {} if dev else {name: True for name in PEERS if name != each.node}
        own = accesses[each.node] = access(each, keyring=KEYRING, clock=clock, entropy=entropy, settings=acl)
        authority = _authority(each, clock, entropy, own, enabled=enabled, cluster_id=cluster_id, config=config)
        raft = rafts[each.node] = FakeRaft(each, () if dev else tuple(PEERS))
        hop.operations[each.node] = Operations(
            each, raft=raft, authority=authority.execute, gate=own.gate, tokens=own.tokens, clock=clock
        )
        tasks.append(asyncio.ensure_future(authority.run()))
    leading = Leader(log, execute=hop.operations[node].execute, hop=hop, clock=clock, entropy=entropy)
    gate = NodeGate(accesses[node].gate, log, leading, clock=clock, down_deny=acl.down_deny)
    cache = LeafCache(log, leading, gate=gate, clock=clock, entropy=entropy, datacenter="dc1", max_entries=1000)
    tasks.append(asyncio.ensure_future(cache.run()))
    requests: Counter[tuple[str, str, int]] = Counter()
    telemetry = Telemetry(
        log,
        rafts[node],
        clock=clock,
        operations=hop.operations[node],
        requests=requests,
        cached=lambda: cache.size,
        blocked=lambda: 0,
    )
    tasks.append(asyncio.ensure_future(telemetry.run()))
    reloads, settings = Reloads(), replace(_settings(node, dev=dev, enabled=enabled), acl=acl)
    view = NodeView(
        log=log,
        leader=leading,
        leaf_cache=cache,
        gate=gate,
        clock=clock,
        entropy=entropy,
        datacenter="dc1",
        node_name=node,
        peers=PEERS if not dev else {node: PEERS[node]},
        connect_enabled=enabled,
        settings=lambda: settings,
        reload=reloads.reload,
        ready=lambda: Readiness(ready=True),
        raft=rafts[node],
        backups=Backups(
            log,
            leading,
            keyring=KEYRING,
            clock=clock,
            entropy=entropy,
            workers=InlineWorkers(),
            servers={name: f"{host}:{port}" for name, (host, port) in PEERS.items()},
            scratch=None,
        ),
        telemetry=telemetry,
        dev=dev,
        requests=requests,
    )
    server = ApiServer(view, [Listener("127.0.0.1", 0)])
    await server.start()
    await _initialized(log, clock, enabled=enabled)
    world = World(log, clock, server, view, hop, rafts, reloads, accesses)
    try:
        yield world
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.server.close()


def _settings(node: str, *, dev: bool, enabled: bool) -> AgentConfig:
    """What the node would have read from its files."""
    flags: dict[str, object] = {"dev": dev, "node_name": node, "connect.enabled": enabled}
    if not dev:
        peers = {
            name: {"address": host, "server_port": port, "forward_port": port + 3}
            for name, (host, port) in PEERS.items()
        }
        flags |= {"data_dir": "c6/d1", "peer": peers, "cluster_secret": base64.b64encode(bytes(range(32))).decode()}
    return AgentConfig.load([], flags=flags, environ={}, hostname=node)


async def _initialized(log: FakeLog, clock: ManualClock, *, enabled: bool) -> None:
    for _ in range(100):
        await settle()
        if not enabled or log.state.active_root is not None:
            return
        await clock.advance(0.1)
    raise AssertionError("the CA did not come up")


def _authority(
    log: FakeLog,
    clock: ManualClock,
    entropy: SeededEntropy,
    own: Access,
    *,
    enabled: bool,
    cluster_id: str,
    config: dict[str, object] | None,
) -> Authority:
    workers = InlineWorkers()
    return Authority(
        log,
        providers=Providers({"consul": builtin_kind(clock, entropy, workers)}),
        keyring=KEYRING,
        clock=clock,
        entropy=entropy,
        workers=workers,
        datacenter="dc1",
        bootstrap=replace(parse_bootstrap("consul", config or {}), cluster_id=cluster_id) if enabled else None,
        gate=own.gate,
        tokens=own.tokens,
    )
