"""Changes of the CA configuration: at most one at a time, announced in the log before the first side effect.

A rotation is BeginChange, then everything that can fail (prepare, cross-sign, prove), then one ActivateRoot. Whoever leads
when the announcing leader dies finds the change in the state and finishes it; nothing of it is visible before ActivateRoot
and everything after it. A request id makes a retry find the first effect instead of causing a second one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, assert_never

import structlog

from caserver.authority.clock_guard import ClockGuard
from caserver.authority.custody import Custody, Signing, seal_root_key
from caserver.authority.plan import BACKDATED, Effect, RotationPlan, cross_signed_until, crosses, plan_change
from caserver.authority.ports import Inspection, Log, Prepared, Provider, verdict
from caserver.authority.probe import Probe
from caserver.environment import Clock, Entropy, Workers
from caserver.errors import (
    CaserverError,
    CommitFailed,
    CommitUnknown,
    Conflict,
    InvalidConfig,
    NotInitialized,
    ProviderRefused,
    ProviderUnavailable,
    from_kind,
)
from caserver.pki.certificates import describe, serial_from
from caserver.pki.chain import HOPS_MAX, beyond_reach, intermediates_for, unexpired
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import ChangeConfiguration, ConfigurationChanged
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    Applied,
    BeginChange,
    NewRoot,
    Reason,
    Refused,
    SetConfiguration,
)
from caserver.state.configuration import CAConfiguration, open_stored, parse_update, same_meaning, seal
from caserver.state.model import CARoot, CAState, Change, Index, RootID

RETIRE_AFTER = 10  # seconds from ActivateRoot to the clean-up at the former provider
NONCE_BYTES = 12
_ABORTED = "aborted"

_Chain = tuple[
    tuple[str, ...], tuple[str, ...]
]  # what leaves carry, and the roots that it does not reach any more (PEM)

_log = structlog.get_logger(__name__)
T = TypeVar("T")


class Rotation:
    """Initializes the CA and changes its configuration, on the leader."""

    def __init__(
        self,
        log: Log,
        *,
        custody: Custody,
        guard: ClockGuard,
        clock: Clock,
        entropy: Entropy,
        workers: Workers,
        hops_max: int = HOPS_MAX,
    ) -> None:
        """``hops_max`` is how many cross-signed certificates new leaves carry at most."""
        self._log = log
        self._hops_max = hops_max
        self._guard = guard
        self._custody = custody
        self._clock = clock
        self._entropy = entropy
        self._probe = Probe(entropy=entropy, workers=workers)
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether a change is being worked on here."""
        return self._lock.locked()

    async def change(self, request: ChangeConfiguration, request_id: str) -> ConfigurationChanged:
        """Bring a new configuration into force; runs to its end even if the caller goes away.

        InvalidConfig and Conflict changed nothing. CommitUnknown: repeating the call with the same request id finds the
        outcome or finishes the change.
        """
        return await self._to_the_end(self._change(request, request_id))

    async def initialize(self) -> None:
        """Give the CA its first root, or finish a change that a former leader left; nothing to do otherwise."""
        await self._to_the_end(self._initialize())

    async def alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` while no change is under way here, to its end even if the caller goes away."""
        return await self._to_the_end(self._alone(work))

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._lock:
            return await work()

    async def close(self) -> None:
        """Cancel what is under way; the next leader finishes it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even where the caller has gone

    async def _initialize(self) -> None:
        async with self._lock:
            await self._log.barrier()
            await self._settle()
            state = self._log.state
            if state.active_root is not None:
                return
            stored = self._stored(state)
            plan = await self._plan(state, stored, stored)
            await self._rotate(plan, self._entropy.bytes(16).hex(), force=False)

    async def _change(self, request: ChangeConfiguration, request_id: str) -> ConfigurationChanged:
        async with self._lock:
            await self._log.barrier()
            await self._settle()
            state = self._log.state
            earlier = _earlier(state, request_id)
            if earlier is not None:
                return earlier
            stored = self._stored(state)
            update = parse_update(request.body, stored=stored, cluster_id=state.cluster_id)
            _check_index(state, request.cas, update.modify_index)
            plan = await self._plan(state, update.configuration, stored)
            match plan.effect:
                case Effect.NOTHING:
                    return ConfigurationChanged(index=plan.expect_index, rotated=False, warnings=plan.warnings)
                case Effect.STORE:
                    return await self._store(plan, request_id)
                case Effect.ROTATE:
                    return await self._rotate(plan, request_id, force=request.force)
                case _:
                    assert_never(plan.effect)

    async def _settle(self) -> None:
        """Finish the change that a former leader left; one that cannot be finished is given up and the old state stays."""
        change = self._log.state.change
        if change is None:
            return
        _log.info("finishing the CA change that a former leader began", request_id=change.request_id)
        try:
            await self._finish(change)
        except (CommitFailed, CommitUnknown):
            raise
        except CaserverError as exc:
            _log.warning("the CA change of a former leader was given up", reason=exc.detail)

    async def _plan(self, state: CAState, wanted: CAConfiguration, stored: CAConfiguration) -> RotationPlan:
        inspection = await self._inspect(state, wanted, stored)
        return plan_change(state, wanted, stored=stored, inspection=inspection, now=_seconds(self._clock.now()))

    async def _inspect(self, state: CAState, wanted: CAConfiguration, stored: CAConfiguration) -> Inspection:
        active = state.active_root
        try:
            return await self._custody.candidate(wanted, trust_domain=_trust_domain(state)).inspect()
        except InvalidConfig:
            # What is in force already may be written back, even if it would not be accepted as new today.
            if active is not None and same_meaning(stored, wanted):
                return Inspection(root_id=active.id, root_pem=active.pem)
            raise

    async def _store(self, plan: RotationPlan, request_id: str) -> ConfigurationChanged:
        command = SetConfiguration(
            request_id=request_id,
            at=_seconds(self._clock.now()),
            expect_index=plan.expect_index,
            expect_epoch=plan.expect_epoch,
            configuration=seal(plan.configuration, self._custody.keyring, self._entropy.bytes(NONCE_BYTES)),
        )
        index = await self._commit(command)
        _log.info("CA provider config updated", index=index, warnings=plan.warnings)
        return ConfigurationChanged(index=index, rotated=False, warnings=plan.warnings)

    async def _rotate(self, plan: RotationPlan, request_id: str, *, force: bool) -> ConfigurationChanged:
        _log.info("CA change planned", request_id=request_id, steps=plan.steps, warnings=plan.warnings)
        begin = BeginChange(
            request_id=request_id,
            at=_seconds(self._clock.now()),
            expect_index=plan.expect_index,
            expect_epoch=plan.expect_epoch,
            configuration=seal(plan.configuration, self._custody.keyring, self._entropy.bytes(NONCE_BYTES)),
            force=force,
        )
        await self._commit(begin)
        change = self._log.state.change
        if change is None or change.request_id != request_id:
            raise CommitUnknown("outcome unknown, read before repeating: the change was overtaken")
        index, overridden = await self._finish(change)
        return ConfigurationChanged(index=index, rotated=True, warnings=(*plan.warnings, *overridden))

    async def _finish(self, change: Change) -> tuple[Index, tuple[str, ...]]:
        """From an announced change to its ActivateRoot, or to its end by AbortChange; index and overridden failures."""
        try:
            command, overridden = await self._make_ready(change)
            self._require_clock()
            index = await self._commit(command)
        except (CommitFailed, CommitUnknown) as exc:
            # The change stands in the log and will be finished: here by a retry, or by the next leader.
            raise CommitUnknown(f"outcome unknown, read before repeating: {exc.detail}") from exc
        except Exception as exc:
            doubt = self._guard.fault()
            if doubt is not None:  # what failed may have failed by the clock alone: the change stands, too
                raise CommitUnknown(f"outcome unknown, read before repeating: {doubt}") from exc
            done = await self._abort(change.request_id, exc)
            if done is None:
                raise
            return done, ()
        _announce(self._log.state, command, index)
        return index, overridden

    async def _make_ready(self, change: Change) -> tuple[ActivateRoot, tuple[str, ...]]:
        """Everything that can fail: prepare the new root, cross-sign it, prove the bundles. Nothing is visible of it."""
        state, now = self._log.state, self._clock.now()
        trust_domain = _trust_domain(state)
        configuration = open_stored(change.configuration, self._custody.keyring)
        new = self._custody.candidate(configuration, trust_domain=trust_domain)
        prepared = await new.prepare(now=now, epoch=change.epoch)
        old = self._predecessor(state, configuration, now)
        crossed = None if old is None else await self._cross_sign(old, prepared, configuration, now)
        root, beyond, failures = await self._proven(
            state, prepared, configuration.provider, new=new, old=old, crossed=crossed
        )
        if failures and not change.force:
            raise InvalidConfig("\n".join(("the change was refused, leaves would not verify after it:", *failures)))
        for failure in failures:
            _log.warning("a failing proof was overridden", failure=failure)
        left_behind = _left_behind(state, beyond, hops_max=self._hops_max)
        for warning in left_behind:
            _log.warning(warning)
        command = ActivateRoot(
            request_id=change.request_id,
            at=_seconds(self._clock.now()),
            expect_epoch=state.ca_epoch,
            root=root,
            retire_not_before=None if state.active_root is None else _seconds(self._clock.now()) + RETIRE_AFTER,
        )
        return command, (*failures, *left_behind)

    def _require_clock(self) -> None:
        """CommitFailed if the clock became doubtful while the root was made: what it dated must not come into force."""
        fault = self._guard.fault()
        if fault is not None:
            raise CommitFailed(fault)

    async def _proven(
        self,
        state: CAState,
        prepared: Prepared,
        provider: str,
        *,
        new: Provider,
        old: Signing | None,
        crossed: str | None,
    ) -> tuple[NewRoot, tuple[str, ...], tuple[str, ...]]:
        """The new root with a short chain that real verifiers accept, the roots left behind, and what fails even so."""
        now = self._clock.now()
        signer = prepared.intermediates[0] if prepared.intermediates else prepared.root_pem

        async def failures_with(hops: tuple[str, ...], beyond: tuple[str, ...]) -> tuple[str, ...]:
            intermediates = (*prepared.intermediates, *hops)
            return await self._probe.failures(
                state,
                old=old,
                new=new,
                root_pem=prepared.root_pem,
                signer_pem=signer,
                intermediates=intermediates,
                beyond=beyond,
                now=now,
            )

        (hops, beyond), (line, beyond_line) = _chains(state, prepared.root_pem, crossed, now, hops_max=self._hops_max)
        failures = await failures_with(hops, beyond)
        if failures and line != hops and not await failures_with(line, beyond_line):
            hops = await _without_needless(line, lambda fewer: failures_with(fewer, beyond_line))
            beyond, failures = beyond_line, ()
        return self._new_root(prepared, provider, (*prepared.intermediates, *hops)), beyond, failures

    def _predecessor(self, state: CAState, wanted: CAConfiguration, now: datetime) -> Signing | None:
        """What signs now, if it is to cross-sign; without cross-signing the old provider is not touched at all."""
        if not crosses(state.active_root, wanted, _seconds(now)):
            return None
        try:
            return self._custody.signing(state)
        except CaserverError as exc:
            raise ProviderUnavailable(
                f"the active root cannot cross-sign its successor: {exc.detail}; "
                "ForceWithoutCrossSigning = true rotates without its help"
            ) from exc

    async def _cross_sign(self, old: Signing, prepared: Prepared, configuration: CAConfiguration, now: datetime) -> str:
        until = cross_signed_until(old.root, configuration, _seconds(now))
        return await old.provider.cross_sign(
            prepared.root_pem,
            csr_pem=prepared.root_csr,
            serial=serial_from(self._entropy.bytes(16)),
            not_before=now.replace(microsecond=0) - timedelta(seconds=BACKDATED),
            not_after=datetime.fromtimestamp(until, UTC),
        )

    def _new_root(self, prepared: Prepared, provider: str, intermediates: tuple[str, ...]) -> NewRoot:
        facts = describe(prepared.root_pem)
        root_id = RootID(facts.id)
        signer = describe(prepared.intermediates[0]) if prepared.intermediates else facts
        sealed = None
        if prepared.root_key is not None:
            nonce = self._entropy.bytes(NONCE_BYTES)
            sealed = seal_root_key(prepared.root_key, self._custody.keyring, root_id=root_id, nonce=nonce)
        return NewRoot(
            id=root_id,
            name=f"{provider.capitalize()} CA Root Cert",
            pem=prepared.root_pem,
            serial=facts.serial,
            not_before=facts.not_before,
            not_after=facts.not_after,
            key_type=facts.key_type,
            key_bits=facts.key_bits,
            signing_key_id=signer.signing_key_id,
            provider=provider,
            intermediates=intermediates,
            sealed_key=sealed,
            backend=tuple(sorted(prepared.backend.items())),
        )

    async def _abort(self, request_id: str, error: Exception) -> Index | None:
        """Give the change up; None once that is certain and ``error`` may be told, an index if another leader did finish it."""
        kind, reason = "", "internal error, see the log of the leader"
        if isinstance(error, CaserverError):
            kind, reason = error.kind, error.detail
        command = AbortChange(request_id=request_id, at=_seconds(self._clock.now()), reason=reason, kind=kind)
        outcome = verdict(await self._log.propose(command))
        match outcome:
            case Applied() | Refused():
                record = self._log.state.requests.get(request_id)
                return record.index if record is not None and not record.result.startswith(_ABORTED) else None
            case NotCommitted(reason=why) | OutcomeUnknown(reason=why):
                raise CommitUnknown(
                    f"outcome unknown, read before repeating: {reason}; giving the change up failed: {why}"
                ) from error
            case _:
                assert_never(outcome)

    async def _commit(self, command: BeginChange | ActivateRoot | SetConfiguration) -> Index:
        """Commit, or find that it was committed; CommitFailed = certainly not, Conflict = refused."""
        outcome = verdict(await self._log.propose(command))
        match outcome:
            case Applied(index=index):
                return index
            case Refused(reason=Reason.DUPLICATE_REQUEST):
                return await self._look_up(command, "the request was repeated while it was under way")
            case Refused() as refused:
                raise Conflict(f"{refused.reason}; read the configuration again and repeat the change")
            case NotCommitted(reason=why):
                raise CommitFailed(f"the change was not committed: {why}")
            case OutcomeUnknown(reason=why):
                return await self._look_up(command, why)
            case _:
                assert_never(outcome)

    async def _look_up(self, command: BeginChange | ActivateRoot | SetConfiguration, why: str) -> Index:
        """Index of the command's effect; CommitUnknown if the state, proven fresh, does not know it."""
        try:
            await self._log.barrier()
        except CaserverError as exc:
            raise CommitUnknown(f"outcome unknown, read before repeating: {why}") from exc
        state = self._log.state
        record = state.requests.get(command.request_id)
        if record is not None and not record.result.startswith(_ABORTED):
            return record.index
        begun = state.change if isinstance(command, BeginChange) else None
        if begun is not None and begun.request_id == command.request_id:
            return begun.begun_index
        raise CommitUnknown(f"outcome unknown, read before repeating: {why}")

    def _stored(self, state: CAState) -> CAConfiguration:
        if state.configuration is None:
            raise NotInitialized("the CA is not initialized yet; try again in a moment")
        return open_stored(state.configuration.stored, self._custody.keyring)


def _earlier(state: CAState, request_id: str) -> ConfigurationChanged | None:
    """The effect that this request had already; the error that it was given up with, if it was."""
    record = state.requests.get(request_id)
    if record is None:
        return None
    if record.result.startswith(_ABORTED):
        kind, _, reason = record.result.removeprefix(_ABORTED).partition(": ")
        raise from_kind(kind.strip() or ProviderRefused.__name__, reason)
    return ConfigurationChanged(index=record.index, rotated=record.result == "activated")


def _check_index(state: CAState, cas: int | None, modify_index: int) -> None:
    current = 0 if state.configuration is None else state.configuration.modify_index
    for wanted in (cas, modify_index or None):
        if wanted is not None and wanted != current:
            raise Conflict(
                f"the configuration is at index {current}, not {wanted}: somebody changed it; "
                "read it again and repeat the change with its ModifyIndex"
            )


def _chains(
    state: CAState, root_pem: str, crossed: str | None, now: datetime, *, hops_max: int
) -> tuple[_Chain, _Chain]:
    """Two chains to choose from: the shortest paths side by side, and one line past every root.

    After rotating back and forth one authority has several cross-signed certificates. OpenSSL takes the first that fits
    and never turns back, so the shortest paths may not do; the former root's whole chain behind the new cross-signed
    certificate does for whoever could follow the former root's.
    """
    roots = _newest_first(state)
    alive = unexpired((root.pem for root in roots), now)
    shortest = intermediates_for(
        root_pem, crossed, tuple((root.pem, root.intermediates) for root in roots), now, at_most=hops_max
    )
    known = dict.fromkeys(pem for root in roots for pem in root.intermediates)
    if crossed is not None:
        known[crossed] = None

    def chain(hops: tuple[str, ...]) -> _Chain:
        return hops, beyond_reach(root_pem, hops, unexpired(known, now), alive)

    active = state.active_root
    if active is None or crossed is None:
        return chain(shortest), chain(shortest)
    line = tuple(dict.fromkeys((crossed, *unexpired(active.intermediates, now))))[:hops_max]
    return chain(shortest), chain(line)


def _left_behind(state: CAState, beyond: tuple[str, ...], *, hops_max: int) -> tuple[str, ...]:
    """What to say of roots to which leaves cannot carry the way any more."""
    ids = ", ".join(root.id for root in state.roots if root.pem in beyond)
    if not ids:
        return ()
    warning = (
        f"new leaves carry at most {hops_max} cross-signed certificates, which do not reach these roots any more: {ids}; "
        "who trusts none but those refuses new leaves until it has fetched the roots again"
    )
    return (warning,)


async def _without_needless(
    line: tuple[str, ...], failures_with: Callable[[tuple[str, ...]], Awaitable[tuple[str, ...]]]
) -> tuple[str, ...]:
    """The chain without the certificates that no verifier misses, so that it does not grow with every rotation."""
    for hop in reversed(line[1:]):
        fewer = tuple(each for each in line if each != hop)
        if not await failures_with(fewer):
            line = fewer
    return line


def _newest_first(state: CAState) -> list[CARoot]:
    return sorted(state.roots, key=lambda root: (not root.active, -(root.rotated_out_at or 0)))


def _announce(state: CAState, command: ActivateRoot, index: Index) -> None:
    """The log line that operators and their scripts wait for, word for word as Consul writes it.

    The state says which root that is: an earlier command of the same request may have come through after all.
    """
    active = state.active_root
    if active is None:
        return
    fields = {"root_id": active.id, "request_id": command.request_id, "index": index}
    if command.retire_not_before is None:
        _log.info("initialized primary datacenter CA with provider", provider=active.provider, **fields)
        return
    _log.info(f"CA rotated to new root under provider {json.dumps(active.provider)}", **fields)


def _trust_domain(state: CAState) -> str:
    if state.trust_domain is None:
        raise NotInitialized("the CA is not initialized yet; try again in a moment")
    return state.trust_domain


def _seconds(instant: datetime) -> int:
    return int(instant.timestamp())
