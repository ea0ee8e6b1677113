"""A leaf cache on fakes: a log whose state the test sets, and a signer that does as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from cryptography import x509
from immutables import Map

from caserver.acl import Permission
from caserver.errors import CaserverError, PermissionDenied
from caserver.fields import Secret
from caserver.leaf_cache import CachedLeaf, LeafCache
from caserver.pki.spiffe import parse_service_uri
from caserver.raft.ports import Leadership
from caserver.requests import Answer, Caller, Failure, IssuedLeaf, LeavesSigned, Request, SignLeaves
from caserver.state.model import CARoot, CAState, Index, RootID
from tests.testkit.fakes import ManualClock, SeededEntropy, settle

CLUSTER = "11111111-2222-3333-4444-555555555555"
CALLER = Caller(token=Secret("web-token"), source="n1 127.0.0.1:9")
LIFE = 3600  # seconds


def root(name: str) -> CARoot:
    return CARoot(
        id=RootID(name),
        name="Consul CA Root Cert",
        pem=name,
        serial=1,
        not_before=0,
        not_after=1 << 40,
        key_type="ec",
        key_bits=256,
        signing_key_id=f"ski of {name}",
        provider="consul",
        intermediates=(),
        sealed_key=None,
        active=True,
        rotated_out_at=None,
        leaf_not_after_max=0,
        leaf_ttl_max=LIFE,
        live_by_hour=Map(),
        create_index=Index(1),
        modify_index=Index(1),
    )


class StateLog:
    """A log whose state the test sets."""

    def __init__(self) -> None:
        self.state = CAState(cluster_id=CLUSTER, index=Index(1), ca_epoch=1, roots=(root("r1"),))
        self.leadership = Leadership(node="n1", leader="n1", term=1, is_leader=True)
        self._moved = asyncio.Event()

    def set(self, state: CAState) -> None:
        self.state = state
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def rotate(self, name: str) -> None:
        state = self.state
        self.set(replace(state, index=Index(state.index + 1), ca_epoch=state.ca_epoch + 1, roots=(root(name),)))

    async def changed(self, select: Callable[[CAState, Leadership], object], seen: object) -> object:
        while (value := select(self.state, self.leadership)) == seen:
            await self._moved.wait()
        return value


class Signer:
    """Signs like a leader: books an index, names the active root, and fails as told."""

    def __init__(self, log: StateLog, clock: ManualClock) -> None:
        self._log = log
        self._clock = clock
        self.failure: CaserverError | None = None
        self.denies: str | None = None  # the only token that the failure is for
        self.as_failure: Failure | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.callers: list[Caller] = []
        self.ahead = 0  # how far the leader is ahead of this node
        self.root_id: str | None = None
        self.backdated = 0  # seconds

    async def execute(self, caller: Caller, request: Request) -> Answer:
        assert isinstance(request, SignLeaves)
        self.callers.append(caller)
        await self.gate.wait()
        spared = self.denies is not None and (caller.token is None or caller.token.reveal() != self.denies)
        if self.failure is not None and not spared:
            raise self.failure
        if self.as_failure is not None:
            return LeavesSigned((self.as_failure,))
        (pem,) = request.csrs
        (uri,) = (
            x509.load_pem_x509_csr(pem.encode())
            .extensions.get_extension_for_class(x509.SubjectAlternativeName)
            .value.get_values_for_type(x509.UniformResourceIdentifier)
        )
        state = self._log.state
        self._log.set(replace(state, index=Index(state.index + 1)))
        now = int(self._clock.now().timestamp())
        root_id = self.root_id or state.roots[0].id
        return LeavesSigned(
            (
                IssuedLeaf(
                    serial=len(self.callers),
                    chain_pem=f"chain {len(self.callers)}",
                    service=parse_service_uri(uri).service,
                    service_uri=uri,
                    not_before=now - self.backdated,
                    not_after=min(now + LIFE, state.roots[0].not_after),
                    root_id=root_id,
                    signing_key_id=f"ski of {root_id}" if self.root_id else state.roots[0].signing_key_id,
                    index=self._log.state.index + self.ahead,
                ),
            )
        )

    @property
    def count(self) -> int:
        return len(self.callers)


class Doorkeeper:
    """Refuses the tokens that it is told to, and remembers who asked for what."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.asked: list[tuple[Caller, Permission]] = []

    async def require(self, caller: Caller, permission: Permission, *, operation: str) -> None:
        self.asked.append((caller, permission))
        if caller.token is not None and caller.token.reveal() in self.refused:
            raise PermissionDenied("Permission denied")


class Rig:
    def __init__(self, *, max_entries: int = 100) -> None:
        self.clock = ManualClock()
        self.log = StateLog()
        self.signer = Signer(self.log, self.clock)
        self.gate = Doorkeeper()
        self.cache = LeafCache(
            cast("Any", self.log),
            cast("Any", self.signer),
            gate=cast("Any", self.gate),
            clock=self.clock,
            entropy=SeededEntropy(),
            datacenter="dc1",
            max_entries=max_entries,
            clock_fault=lambda: self.clock_fault,
        )
        self.clock_fault: str | None = None

    async def get(self, service: str = "web", **options: Any) -> CachedLeaf:
        return await self.cache.leaf(CALLER, service, **options)

    def start(self, service: str = "web", **options: Any) -> asyncio.Task[CachedLeaf]:
        return asyncio.ensure_future(self.get(service, **options))


@asynccontextmanager
async def running(*, max_entries: int = 100) -> AsyncIterator[Rig]:
    rig = Rig(max_entries=max_entries)
    runner = asyncio.ensure_future(rig.cache.run())
    await settle()
    try:
        yield rig
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
