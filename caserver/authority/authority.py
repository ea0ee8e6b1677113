"""The leader's decisions, and the one door to them.

While this node leads, ``run`` holds office: it bootstraps an empty cluster, finishes what a former leader began, opens the
CA key and does what falls due. Trouble with the CA never touches the leadership: it is tried again with back-off and shown
in ``degraded``, while reads go on. Nothing is generated because local state is empty: only after a barrier showed that the
log of the whole cluster holds none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, assert_never

import structlog

from caserver.acl import SERVICE_WRITE, permission_of
from caserver.authority.cleanups import Cleanups
from caserver.authority.clock_guard import ClockGuard
from caserver.authority.custody import Custody
from caserver.authority.founding import REMEDY, Founding
from caserver.authority.gate import Gate, admit, recorded
from caserver.authority.issuance import Issuance
from caserver.authority.maintenance import Maintenance
from caserver.authority.ports import Log, Providers
from caserver.authority.preparation import Preparation
from caserver.authority.resealing import Resealing
from caserver.authority.restoration import Restoration
from caserver.authority.rotation import Rotation
from caserver.authority.tending import Tending
from caserver.authority.tokens import Tokens
from caserver.cleanup_requests import ForgetCleanup, ReadCleanups
from caserver.environment import Clock, Entropy, Workers
from caserver.errors import (
    CaserverError,
    ConnectDisabled,
    Corrupt,
    InvalidConfig,
    NotInitialized,
    NotLeader,
    PermissionDenied,
    ProviderRefused,
    ProviderUnavailable,
)
from caserver.internode.keyring import Keyring
from caserver.pki.chain import HOPS_MAX
from caserver.raft.ports import Leadership
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    CAAnswer,
    Caller,
    CARequest,
    ChangeConfiguration,
    CommitRestore,
    ConfigurationChanged,
    Failure,
    IssuedLeaf,
    LeavesSigned,
    ReadAt,
    ReadIndex,
    SignLeaves,
    StageRestore,
)
from caserver.state.configuration import CAConfiguration, not_in_force, open_stored
from caserver.state.model import CAState, Index

BACKOFF_MIN = 1.0  # seconds before office is tried to be taken again; doubles up to
BACKOFF_MAX = 60.0
ANNOUNCED_MAX = 256  # writes that are remembered, to be announced once however often they are tried

_log = structlog.get_logger(__name__)


_Office = tuple[int, Index] | None


def office(state: CAState, leadership: Leadership) -> _Office:
    """Selector of ``Log.changed``: the term in which this node leads and the past that it leads on, None while it does not.

    A restore ends an office like a new term does: whatever was opened or begun belongs to another past.
    """
    return (leadership.term, state.restored_index) if leadership.is_leader else None


async def _together(*works: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run all of them until one ends or fails, and end the others."""
    tasks = [asyncio.get_running_loop().create_task(work()) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Authority:
    """The certificate authority of this node: acts while the node leads, refuses with NotLeader otherwise."""

    def __init__(
        self,
        log: Log,
        *,
        providers: Providers,
        keyring: Keyring,
        clock: Clock,
        entropy: Entropy,
        workers: Workers,
        datacenter: str,
        bootstrap: CAConfiguration | None,
        gate: Gate,
        tokens: Tokens,
        hops_max: int = HOPS_MAX,
    ) -> None:
        """``bootstrap`` seeds the first configuration of the cluster; None = Connect is disabled on this node.

        ``hops_max`` is how many cross-signed certificates new leaves carry at most.
        """
        self._log = log
        self._keyring = keyring
        self._clock = clock
        self._entropy = entropy
        self._bootstrap = bootstrap
        self._gate = gate
        self._tokens = tokens
        self._custody = Custody(providers, keyring)
        self._tending = Tending(log, custody=self._custody, clock=clock)
        self._issuance = Issuance(
            log,
            custody=self._custody,
            clock=clock,
            entropy=entropy,
            datacenter=datacenter,
            suspect=self._tending.suspect,
        )
        self._guard = ClockGuard(log, clock)
        self._rotation = Rotation(
            log,
            custody=self._custody,
            guard=self._guard,
            preparation=Preparation(
                custody=self._custody, clock=clock, entropy=entropy, workers=workers, hops_max=hops_max
            ),
            clock=clock,
            entropy=entropy,
        )
        self._founding = Founding(log, custody=self._custody, clock=clock, entropy=entropy)
        self._urged = asyncio.Event()  # office is to be tried to be taken at once
        self._restoration = Restoration(log, rotation=self._rotation, keyring=keyring, clock=clock)
        self._maintenance = Maintenance(
            log,
            custody=self._custody,
            rotation=self._rotation,
            signer_lost=self._tending.signer_lost,
            resealing=Resealing(log, keyring=keyring, clock=clock, entropy=entropy),
            clock=clock,
            guard=self._guard,
        )
        self._cleanups = Cleanups(
            log, custody=self._custody, rotation=self._rotation, clock=clock, why=self._maintenance.why_owed
        )
        self._trouble: str | None = None
        self._announced: dict[str, None] = {}  # request ids, oldest first

    @property
    def token_expires_at(self) -> float | None:
        """Epoch seconds at which the CA provider's token expires; None: there is none here, or it never does."""
        return self._tending.token_expires_at

    @property
    def degraded(self) -> tuple[tuple[str, str], ...]:
        """What is wrong with the CA as seen here: (code, reason), empty if nothing is."""
        if self._bootstrap is None:
            return ()
        state = self._log.state
        found = []
        if self._trouble is not None:
            found.append(("CATrouble", self._trouble))
        if (fault := self._guard.fault()) is not None:
            found.append(("ClockSkew", fault))
        active = state.active_root
        if active is None:
            found.append(("CANotInitialized", "the CA has no active root yet"))
        elif active.not_after <= self._clock.now().timestamp():
            found.append(("CARootExpired", f"the active root {active.id} has expired; no leaf can be signed"))
        found += [*self._maintenance.troubles, *self._tending.troubles]
        first: dict[str, str] = {}
        for code, reason in found:
            first.setdefault(code, reason)
        return tuple(first.items())

    def clock_fault(self) -> str | None:
        """Why the wall clock of this node is not to be trusted right now; None if it is."""
        return self._guard.fault()

    async def watch_clock(self, hand_over: Callable[[], Awaitable[bool]]) -> None:
        """Keep an eye on the clock until cancelled; ``hand_over`` lets another node lead while this one's is off."""
        await self._guard.watch(hand_over)

    async def execute(self, caller: Caller, request: CARequest) -> CAAnswer:
        """Do one operation; NotLeader if this node does not lead."""
        if self._bootstrap is None and not isinstance(request, ReadIndex):
            raise ConnectDisabled
        leadership = self._log.leadership
        if not leadership.is_leader:
            raise NotLeader("this node does not lead")
        match request:
            case SignLeaves(csrs=csrs):
                self._guard.require()
                return LeavesSigned(await self._sign(caller, csrs))
            case ChangeConfiguration():
                self._guard.require()
                request_id = caller.request_id or self._entropy.bytes(16).hex()
                self._announce(caller, request_id)
                return await self._change(caller, request, request_id)
            case AdmitRestore() | StageRestore() | CommitRestore() | AbortRestore():
                return await self._restoration.execute(caller, request, still=self._admission(caller, request))
            case ReadCleanups() | ForgetCleanup():
                return await self._cleanups.execute(caller, request, still=self._admission(caller, request))
            case ReadIndex(consistent=consistent):
                if consistent or self._clock.monotonic() >= leadership.fresh_until:
                    await self._log.barrier()
                return ReadAt(self._log.state.index)
            case _:
                assert_never(request)

    def _announce(self, caller: Caller, request_id: str) -> None:
        """Log a write, once: while it is held it comes again and again under the same id."""
        if request_id in self._announced:
            return
        self._announced[request_id] = None
        if len(self._announced) > ANNOUNCED_MAX:
            del self._announced[next(iter(self._announced))]
        _log.info("CA configuration write", source=caller.source, request_id=request_id)

    @property
    def is_founded(self) -> bool:
        """Whether the cluster has its first configuration, as far as this node knows."""
        return self._founding.is_done

    def reseed(self, bootstrap: CAConfiguration) -> None:
        """Found the cluster with another first configuration, if it is not founded yet; tried at once."""
        self._bootstrap = bootstrap
        self._urged.set()

    async def _change(self, caller: Caller, request: ChangeConfiguration, request_id: str) -> ConfigurationChanged:
        still = self._admission(caller, request)
        if self._bootstrap is not None and not self._founding.is_done:
            request = await self._founding.by_request(request, self._bootstrap, still=still)
            self._urged.set()
        return await self._rotation.change(request, request_id, still=still)

    async def run(self) -> None:
        """Take office whenever this node becomes leader and leave it when it stops leading; until cancelled.

        Raises what ends an office that nobody ended: a leader must not go on with its CA unattended.
        """
        term: _Office = None
        holding: asyncio.Task[None] | None = None
        try:
            while True:
                term = await self._next_term(term, holding)
                await self._resign(holding)
                holding = None
                if term is not None and self._bootstrap is not None:
                    office_work = _together(self._hold_office, self._tending.run)
                    holding = asyncio.get_running_loop().create_task(office_work)
        finally:
            await self._resign(holding)
            await self._issuance.close()
            await self._rotation.close()

    async def _next_term(self, term: _Office, holding: asyncio.Task[None] | None) -> _Office:
        changed = asyncio.ensure_future(self._log.changed(office, term))
        try:
            await asyncio.wait(
                {changed} if holding is None else {changed, holding}, return_when=asyncio.FIRST_COMPLETED
            )
            if holding is not None and holding.done() and not changed.done():
                holding.result()
                raise RuntimeError("the office ended by itself")
            return await changed
        finally:
            changed.cancel()

    async def _resign(self, holding: asyncio.Task[None] | None) -> None:
        if holding is not None:
            holding.cancel()
            await asyncio.wait((holding,))
        self._custody.forget()
        self._trouble = None

    async def _hold_office(self) -> None:
        backoff = BACKOFF_MIN
        while True:
            self._urged.clear()
            if await self._took_office():
                break
            await _together(partial(self._clock.sleep, backoff * self._entropy.uniform(0.75, 1.25)), self._urged.wait)
            backoff = BACKOFF_MIN if self._urged.is_set() else min(BACKOFF_MAX, 2 * backoff)
        await self._maintenance.run()

    async def _took_office(self) -> bool:
        bootstrap = self._bootstrap
        if bootstrap is None:
            return True
        try:
            await self._take_office(bootstrap)
        except (CaserverError, Corrupt, TimeoutError) as exc:
            told = str(exc) or "the CA provider did not answer in time"
            of_files = isinstance(exc, InvalidConfig | ProviderRefused | ProviderUnavailable)
            self._trouble = f"{told}\n{REMEDY}" if of_files and not self._founding.is_done else told
            _log.warning("the CA is not ready, this will be tried again", reason=self._trouble)
            return False
        except Exception:  # noqa: BLE001 - a bug in the CA must not end the office; logged with its traceback
            self._trouble = "internal error, see the log of the leader"
            _log.exception("the CA is not ready, this will be tried again")
            return False
        self._trouble = None
        return True

    async def _take_office(self, bootstrap: CAConfiguration) -> None:
        await self._log.barrier()
        await self._founding.by_file(bootstrap)
        await self._tokens.initialize()
        self._compare(bootstrap)
        if self._log.state.active_root is None or self._log.state.change is not None:
            self._guard.require()
        await self._rotation.initialize()
        self._custody.signing(self._log.state)

    def _compare(self, bootstrap: CAConfiguration) -> None:
        configuration = self._log.state.configuration
        if configuration is None:
            return
        if keys := not_in_force(bootstrap, open_stored(configuration.stored, self._keyring)):
            _log.warning(
                f"ca_config: {', '.join(keys)} of this node's file: not what is in force; it seeds the first bootstrap only, "
                "change the CA with `caserver connect ca set-config`"
            )

    def _admission(self, caller: Caller, request: CARequest) -> Callable[[], None]:
        """What asks the gate once more, after a request has waited for its turn: PermissionDenied if it may not any more."""
        return partial(admit, self._gate, caller, permission_of(request), operation=type(request).__name__)

    async def _sign(self, caller: Caller, csrs: tuple[str, ...]) -> tuple[IssuedLeaf | Failure, ...]:
        def refusal(service: str) -> PermissionDenied | None:
            permission = SERVICE_WRITE.of(service)
            found = self._gate.refusal(caller, permission)
            return found and recorded(self._gate, found, caller, permission, operation="SignLeaves")

        try:
            return await self._issuance.sign(csrs, refusal=refusal)
        except NotInitialized as exc:
            if self._trouble is None:
                raise
            raise NotInitialized(f"{exc.detail}: {self._trouble}") from exc
