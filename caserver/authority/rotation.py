"""Changes of the CA configuration: at most one at a time, announced in the log before the first side effect.

A rotation is BeginChange, then everything that can fail (prepare, cross-sign, prove), then one ActivateRoot. Whoever leads
when the announcing leader dies finds the change in the state and finishes it; nothing of it is visible before ActivateRoot
and everything after it. A request id makes a retry find the first effect instead of causing a second one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, assert_never

import structlog

from caserver.authority.clock_guard import ClockGuard
from caserver.authority.custody import Custody
from caserver.authority.plan import Effect, RotationPlan, plan_change
from caserver.authority.ports import Inspection, Log, verdict
from caserver.authority.preparation import NONCE_BYTES, Preparation, Ready, trust_domain_of
from caserver.environment import Clock, Entropy, within
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
from caserver.raft.ports import Leadership, NotCommitted, OutcomeUnknown
from caserver.requests import ChangeConfiguration, ConfigurationChanged
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    Applied,
    BeginChange,
    Reason,
    Refused,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.configuration import CAConfiguration, open_stored, parse_update, same_meaning, seal
from caserver.state.model import CAState, Change, Index

CHANGE_MAX = 45.0  # seconds that providers may take for one change, all in all
CLEAN_UP_MAX = 10.0  # seconds that removing what is not needed any more may hold up a change
CLEAN_UP_AFTER = (
    60  # seconds from giving a change up to its clean-up: what was asked of a backend may still arrive there
)
_ABORTED = "aborted"

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
        preparation: Preparation,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._log = log
        self._guard = guard
        self._custody = custody
        self._clock = clock
        self._entropy = entropy
        self._preparation = preparation
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def busy(self) -> bool:
        """Whether a change is being worked on here."""
        return self._lock.locked()

    async def change(
        self, request: ChangeConfiguration, request_id: str, *, still: Callable[[], None]
    ) -> ConfigurationChanged:
        """Bring a new configuration into force; runs to its end even if the caller goes away.

        ``still`` raises if the caller may not any more when it is the turn of the request: others may take long.
        InvalidConfig and Conflict changed nothing. CommitUnknown: repeating the call with the same request id finds the
        outcome or finishes the change.
        """
        return await self._to_the_end(self._change(request, request_id, still))

    async def initialize(self) -> None:
        """Give the CA its first root, or finish a change that a former leader left; nothing to do otherwise."""
        await self._to_the_end(self._initialize())

    async def alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work`` while no change is under way here, to its end even if the caller goes away."""
        return await self._to_the_end(self._alone(work))

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._lock:
            return await work()

    async def renew(self) -> bool:
        """Have what signs leaves below the active root made anew; whether it was.

        False: a change is under way, ask again. The provider is asked how it is first, so that one that is not there costs
        the log nothing.
        """
        if self._lock.locked():
            return False
        return await self._to_the_end(self._renew_in_turn())

    async def undisturbed(self, work: Awaitable[None]) -> None:
        """Await what must not go on while a provider is prepared; ProviderUnavailable if it takes too long."""
        async with self._lock:
            await self._bounded(self._clock.monotonic() + CLEAN_UP_MAX, work)

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
            until = self._clock.monotonic() + CHANGE_MAX
            await self._log.barrier()
            await self._settle(until)
            state = self._log.state
            if state.active_root is not None:
                return
            stored = self._stored(state)
            plan = await self._plan(state, stored, stored, until)
            await self._announced(plan, self._entropy.bytes(16).hex(), until, force=False)

    async def _change(
        self, request: ChangeConfiguration, request_id: str, still: Callable[[], None]
    ) -> ConfigurationChanged:
        async with self._lock:
            until = self._clock.monotonic() + CHANGE_MAX
            await self._log.barrier()
            await self._settle(until)
            state = self._log.state
            earlier = _earlier(state, request_id)
            if earlier is not None:
                return earlier
            still()
            stored = self._stored(state)
            update = parse_update(
                request.body, stored=stored, cluster_id=state.cluster_id, local=self._custody.vault_local
            )
            check_index(state, request.cas, update.modify_index)
            plan = await self._plan(state, update.configuration, stored, until)
            match plan.effect:
                case Effect.NOTHING:
                    return ConfigurationChanged(index=plan.expect_index, rotated=False, warnings=plan.warnings)
                case Effect.STORE:
                    return await self._store(plan, request_id)
                case Effect.RENEW | Effect.ROTATE:
                    return await self._announced(plan, request_id, until, force=request.force)
                case _:
                    assert_never(plan.effect)

    async def _renew_in_turn(self) -> bool:
        async with self._lock:
            until = self._clock.monotonic() + CHANGE_MAX
            await self._log.barrier()
            state = self._log.state
            configuration = state.configuration
            if state.change is not None or state.active_root is None or configuration is None:
                return False
            await self._inspected(state, open_stored(configuration.stored, self._custody.keyring), until)
            begin = BeginChange(
                request_id=self._entropy.bytes(16).hex(),
                at=self._now(),
                expect_index=configuration.modify_index,
                expect_epoch=state.ca_epoch,
                configuration=configuration.stored,
                renew=True,
            )
            await self._begun(begin, until)
            return True

    async def _settle(self, until: float) -> None:
        """Finish the change that a former leader left; one that cannot be finished is given up and the old state stays."""
        change = self._log.state.change
        if change is None:
            return
        _log.info("finishing the CA change that a former leader began", request_id=change.request_id)
        try:
            await self._finish(change, until)
        except (CommitFailed, CommitUnknown):
            raise
        except CaserverError as exc:
            _log.warning("the CA change of a former leader was given up", reason=exc.detail)

    async def _plan(
        self, state: CAState, wanted: CAConfiguration, stored: CAConfiguration, until: float
    ) -> RotationPlan:
        active = state.active_root
        try:
            inspection = await self._inspected(state, wanted, until)
        except InvalidConfig as exc:
            # What is in force already may be written back, even if it would not be accepted as new today.
            if active is None or not same_meaning(stored, wanted):
                raise
            inspection = Inspection(root_id=active.id, root_pem=active.pem, warnings=(exc.detail,))
        return plan_change(state, wanted, stored=stored, inspection=inspection, now=self._now())

    async def _inspected(self, state: CAState, wanted: CAConfiguration, until: float) -> Inspection:
        with self._custody.provider(wanted, None, trust_domain=trust_domain_of(state)) as provider:
            return await self._bounded(until, provider.inspect())

    async def _bounded(self, until: float, work: Awaitable[T]) -> T:
        """Await a provider until a monotonic instant, and while this node leads; ProviderUnavailable, CommitFailed from then on."""
        doing = asyncio.ensure_future(work)
        try:
            left = max(0.0, until - self._clock.monotonic())
            return await within(self._clock, left, self._while_leading(doing))
        except TimeoutError:
            raise ProviderUnavailable(
                "the CA provider did not answer in time; /v1/status/ready tells its troubles"
            ) from None
        finally:
            doing.cancel()

    async def _while_leading(self, doing: asyncio.Future[T]) -> T:
        """Let nothing more be asked of a backend once another leader may be at it: it may have cleaned up there already."""
        term = _term_led(self._log.state, self._log.leadership)
        lost = asyncio.ensure_future(self._log.changed(_term_led, term))
        try:
            if term is not None:
                await asyncio.wait((doing, lost), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise CommitFailed("this node ceased to lead before the CA provider was done")
            return doing.result()
        finally:
            lost.cancel()

    async def _store(self, plan: RotationPlan, request_id: str) -> ConfigurationChanged:
        command = SetConfiguration(
            request_id=request_id,
            at=self._now(),
            expect_index=plan.expect_index,
            expect_epoch=plan.expect_epoch,
            configuration=seal(plan.configuration, self._custody.keyring, self._entropy.bytes(NONCE_BYTES)),
        )
        index = await self._commit(command)
        _log.info("CA provider config updated", index=index, warnings=plan.warnings)
        return ConfigurationChanged(index=index, rotated=False, warnings=plan.warnings)

    async def _announced(
        self, plan: RotationPlan, request_id: str, until: float, *, force: bool
    ) -> ConfigurationChanged:
        """Carry a plan out that has side effects at a provider."""
        _log.info("CA change planned", request_id=request_id, steps=plan.steps, warnings=plan.warnings)
        stored = seal(plan.configuration, self._custody.keyring, self._entropy.bytes(NONCE_BYTES))
        renew = plan.effect is Effect.RENEW
        begin = BeginChange(
            request_id=request_id,
            at=self._now(),
            expect_index=plan.expect_index,
            expect_epoch=plan.expect_epoch,
            configuration=stored,
            force=force,
            renew=renew,
        )
        index, noted = await self._begun(begin, until)
        warnings = tuple(dict.fromkeys((*plan.warnings, *noted)))
        return ConfigurationChanged(index=index, rotated=not renew, warnings=warnings)

    async def _begun(self, begin: BeginChange, until: float) -> tuple[Index, tuple[str, ...]]:
        """Announce a change and bring it to its end."""
        await self._commit(begin)
        change = self._log.state.change
        if change is None or change.request_id != begin.request_id:
            raise CommitUnknown("outcome unknown, read before repeating: the change was overtaken")
        return await self._finish(change, until)

    async def _finish(self, change: Change, until: float) -> tuple[Index, tuple[str, ...]]:
        """From an announced change to what completes it, or to its end by AbortChange; index and what is to be told."""
        try:
            ready = await self._bounded(until, self._preparation.make_ready(self._log.state, change))
            self._require_clock()
            index = await self._commit(ready.command)
        except (CommitFailed, CommitUnknown) as exc:
            # The change stands in the log and will be finished: here by a retry, or by the next leader.
            raise CommitUnknown(f"outcome unknown, read before repeating: {exc.detail}") from exc
        except Exception as exc:
            doubt = self._guard.fault()
            if doubt is not None:  # what failed may have failed by the clock alone: the change stands, too
                raise CommitUnknown(f"outcome unknown, read before repeating: {doubt}") from exc
            done = await self._abort(change, exc)
            if done is None:
                raise
            return done, ()
        _announce(self._log.state, ready, index)
        return index, ready.warnings

    def _require_clock(self) -> None:
        """CommitFailed if the clock became doubtful while the root was made: what it dated must not come into force."""
        fault = self._guard.fault()
        if fault is not None:
            raise CommitFailed(fault)

    async def _abort(self, change: Change, error: Exception) -> Index | None:
        """Give the change up; None once that is certain and ``error`` may be told, an index if another leader did finish it."""
        kind, reason = "", "internal error, see the log of the leader"
        if isinstance(error, CaserverError):
            kind, reason = error.kind, error.detail
        outcome = verdict(await self._log.propose(self._giving_up(change, reason, kind)))
        match outcome:
            case Applied() | Refused():
                record = self._log.state.requests.get(change.request_id)
                return record.index if record is not None and not record.result.startswith(_ABORTED) else None
            case NotCommitted(reason=why) | OutcomeUnknown(reason=why):
                raise CommitUnknown(
                    f"outcome unknown, read before repeating: {reason}; giving the change up failed: {why}"
                ) from error
            case _:
                assert_never(outcome)

    def _giving_up(self, change: Change, reason: str, kind: str) -> AbortChange:
        leaves_something = self._custody.kind(change.configuration.provider).chooses_serials
        return AbortChange(
            request_id=change.request_id,
            at=self._now(),
            reason=reason,
            kind=kind,
            retire_not_before=self._now() + CLEAN_UP_AFTER if leaves_something else None,
        )

    async def _commit(self, command: BeginChange | ActivateRoot | SetConfiguration | SetIntermediate) -> Index:
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

    async def _look_up(
        self, command: BeginChange | ActivateRoot | SetConfiguration | SetIntermediate, why: str
    ) -> Index:
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

    def _now(self) -> int:
        return int(self._clock.now().timestamp())


def _term_led(_state: CAState, leadership: Leadership) -> int | None:
    """Selector of ``Log.changed``: the term in which this node leads, None while it does not."""
    return leadership.term if leadership.is_leader else None


def _earlier(state: CAState, request_id: str) -> ConfigurationChanged | None:
    """The effect that this request had already; the error that it was given up with, if it was."""
    record = state.requests.get(request_id)
    if record is None:
        return None
    if record.result.startswith(_ABORTED):
        kind, _, reason = record.result.removeprefix(_ABORTED).partition(": ")
        raise from_kind(kind.strip() or ProviderRefused.__name__, reason)
    return ConfigurationChanged(index=record.index, rotated=record.result == "activated")


def check_index(state: CAState, cas: int | None, modify_index: int) -> None:
    """Conflict if a write was decided on another configuration than the one in force (0: none is)."""
    current = 0 if state.configuration is None else state.configuration.modify_index
    for wanted in (cas, modify_index or None):
        if wanted is not None and wanted != current:
            raise Conflict(
                f"the configuration is at index {current}, not {wanted}: somebody changed it; "
                "read it again and repeat the change with its ModifyIndex"
            )


def _announce(state: CAState, ready: Ready, index: Index) -> None:
    """The log line that operators and their scripts wait for, word for word as Consul writes it.

    The state says which root that is: an earlier command of the same request may have come through after all.
    """
    for warning in ready.warnings:
        _log.warning("a CA change came into force with a warning", warning=warning)
    active, command = state.active_root, ready.command
    if active is None:
        return
    fields = {"root_id": active.id, "request_id": command.request_id, "index": index}
    if isinstance(command, SetIntermediate):
        _log.info("what signs leaves was made anew", signing_key_id=active.signing_key_id, **fields)
    elif command.retire_not_before is None:
        _log.info("initialized primary datacenter CA with provider", provider=active.provider, **fields)
    else:
        _log.info(f"CA rotated to new root under provider {json.dumps(active.provider)}", **fields)
