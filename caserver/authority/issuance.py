"""Leaves: limit, book in batches, sign what was booked, check, answer.

All requests that wait together become one ``IssueLeaves``; while a few of those are under way the next batch collects.
The commit of the command is the fence before every signature: without a quorum, or after the active root changed, nothing
is signed. Templates are built from the rows that apply returned, never from what a caller sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import assert_never

import structlog

from caserver.authority.custody import Custody, Signing
from caserver.authority.ports import Log, SignedLeaf, SigningOrder, verdict
from caserver.authority.serials import SerialRecorder
from caserver.environment import Clock, Entropy, within
from caserver.errors import (
    CaserverError,
    CommitFailed,
    InvalidCSR,
    NotInitialized,
    NotLeader,
    ProviderUnavailable,
    RateLimited,
    Unavailable,
)
from caserver.pki.certificates import LeafTemplate, serial_from
from caserver.pki.chain import check_foreign_leaf, check_leaf
from caserver.pki.csr import CheckedCSR, check_csrs
from caserver.pki.spiffe import ServiceID, leaf_common_name
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import Failure, IssuedLeaf
from caserver.state.commands import Applied, IssueLeaves, LeafOrder, Reason, Refused
from caserver.state.model import Effective, LedgerRow

BACKDATED = 60  # seconds that a leaf's NotBefore lies in the past, for clocks that lag
PIPELINE = 3  # proposals under way before the next batch has to wait
BATCH_MAX = 128  # leaves of one proposal: checking them holds the loop for about 15 ms
DROP_AFTER = 5.0  # seconds from proposal to signature; later ones are dropped
_STALE = (Reason.STALE_EPOCH, Reason.ROOT_NOT_ACTIVE)

Refusal = Callable[[str], CaserverError | None]  # of a service

_log = structlog.get_logger(__name__)


class CSRLimiter:
    """A token bucket (one second's worth deep), or a cap on what is under way when no rate is set."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rate = 0.0
        self._tokens = 0.0
        self._filled_at = 0.0
        self._under_way = 0

    def admit(self, effective: Effective) -> None:
        """Count one CSR in, or refuse it at once with RateLimited; ``release`` must follow an admission."""
        if effective.csr_max_per_second > 0:
            self._take(effective.csr_max_per_second)
        elif 0 < effective.csr_max_concurrent <= self._under_way:
            raise RateLimited("Rate limit reached, try again later")
        self._under_way += 1

    def release(self) -> None:
        """Count one CSR out."""
        self._under_way -= 1

    def _take(self, rate: float) -> None:
        now = self._clock.monotonic()
        depth = max(1.0, rate)
        if rate != self._rate:
            self._rate, self._tokens = rate, depth
        else:
            self._tokens = min(depth, self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now
        if self._tokens < 1.0:
            raise RateLimited("Rate limit reached, try again later", retry_after=(1.0 - self._tokens) / rate)
        self._tokens -= 1.0


@dataclass(eq=False, slots=True)
class _Waiting:
    csr: CheckedCSR
    result: asyncio.Future[IssuedLeaf]


@dataclass(frozen=True, slots=True)
class _Booked:
    signing: Signing
    applied: Applied
    by_issue_id: dict[str, _Waiting]
    travelling: str  # what follows each leaf in its chain, PEM


class Issuance:
    """Signs service leaves on the leader."""

    def __init__(
        self,
        log: Log,
        *,
        custody: Custody,
        clock: Clock,
        entropy: Entropy,
        datacenter: str,
        suspect: Callable[[], None] = lambda: None,
    ) -> None:
        """``suspect`` is told when an external provider did not sign."""
        self._suspect = suspect
        self._log = log
        self._custody = custody
        self._clock = clock
        self._entropy = entropy
        self._datacenter = datacenter
        self._limiter = CSRLimiter(clock)
        self._waiting: list[_Waiting] = []
        self._flush_due = False
        self._batches: set[asyncio.Task[None]] = set()
        self._signatures: set[asyncio.Task[IssuedLeaf]] = set()  # under way at an external provider
        self._recorder = SerialRecorder(log, clock)

    async def sign(self, csrs: Sequence[str], *, refusal: Refusal) -> tuple[IssuedLeaf | Failure, ...]:
        """One result per CSR (PEM), in order; ``refusal`` says why the caller may not have a leaf of a service.

        What is wrong with one CSR is its own Failure. What is wrong with this node or the cluster is raised, unless some
        leaf was signed all the same: nothing is booked twice by a caller who tries such an error again elsewhere, save for
        ledger entries that expire.
        """
        state = self._log.state
        if state.trust_domain is None or state.configuration is None:
            raise NotInitialized("the CA is not initialized yet; try again in a moment")
        effective = state.configuration.stored.effective
        checked = check_csrs(list(csrs), trust_domain=state.trust_domain, datacenter=self._datacenter)
        entered = [self._enter(each, effective, refusal) for each in checked]
        pending = [each for each in entered if isinstance(each, asyncio.Future)]
        await asyncio.gather(*pending, return_exceptions=True)
        return _results(entered)

    async def close(self) -> None:
        """End what is under way; its callers are told that this node does not lead."""
        under_way = (*self._batches, *self._signatures)
        for task in under_way:
            task.cancel()
        for waiting in self._waiting:
            _fail(waiting, NotLeader("this node stopped leading before the leaf was booked"))
        self._waiting.clear()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._recorder.close()

    def _enter(
        self, checked: CheckedCSR | InvalidCSR, effective: Effective, refusal: Refusal
    ) -> asyncio.Future[IssuedLeaf] | CaserverError:
        if isinstance(checked, InvalidCSR):
            return checked
        if (denied := refusal(checked.service_id.service)) is not None:
            return denied  # before the limiter: who may not have a leaf takes nobody's place
        try:
            self._limiter.admit(effective)
        except RateLimited as exc:
            return exc
        waiting = _Waiting(csr=checked, result=asyncio.get_running_loop().create_future())
        waiting.result.add_done_callback(lambda _: self._limiter.release())
        self._waiting.append(waiting)
        self._schedule()
        return waiting.result

    def _schedule(self) -> None:
        if self._flush_due or not self._waiting or len(self._batches) >= PIPELINE:
            return
        self._flush_due = True
        # After everything that is ready in this turn of the loop: those requests travel together.
        asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
        if not batch:
            return
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._batches.add(task)
        task.add_done_callback(self._landed)
        self._schedule()

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        if not task.cancelled():
            task.exception()  # seen: every request of the batch was told
        self._schedule()

    async def _run(self, batch: list[_Waiting]) -> None:
        live = [waiting for waiting in batch if not waiting.result.done()]
        try:
            if live and await self._issue(live):
                live = []
        except CaserverError as exc:
            _fail_all(live, exc)
        except Exception as exc:  # noqa: BLE001 - told to the callers and logged with its traceback
            _log.exception("a batch of leaves failed", leaves=len(live))
            _fail_all(live, exc)
        finally:
            _fail_all(live, NotLeader("this node stopped leading before the leaf was signed"))

    async def _issue(self, live: list[_Waiting]) -> bool:
        """Book and sign; whether somebody else answers the callers, because the signatures are made elsewhere."""
        started = self._clock.monotonic()
        booked = await self._book(live)
        rows = [row for _, _, row in booked.applied.rows]
        orders = [_order(row, booked, self._datacenter) for row in rows]
        if booked.signing.chooses_serials:
            for place, order in zip(booked.applied.rows, orders, strict=True):
                self._sign_elsewhere(place, order, booked, started)
            return True
        signed = await booked.signing.provider.sign_leaves(orders)
        if self._clock.monotonic() - started > DROP_AFTER:
            raise Unavailable(f"the signature took longer than {DROP_AFTER:g} s and was dropped; try again")
        self._require_booking(booked)
        for row, order, result in zip(rows, orders, signed, strict=True):
            self._deliver(row, order, result, booked)
        return False

    def _sign_elsewhere(
        self, row: tuple[int, int, LedgerRow], order: SigningOrder, booked: _Booked, started: float
    ) -> None:
        """Have one leaf signed by an external provider, whose pool bounds how many are; the next batch does not wait for it."""
        waiting = booked.by_issue_id[order.issue_id]
        work = self._signed_elsewhere(row, order, booked, started)
        task = asyncio.get_running_loop().create_task(work)
        self._signatures.add(task)

        def told(done: asyncio.Task[IssuedLeaf]) -> None:
            self._signatures.discard(done)
            if done.cancelled():
                _fail(waiting, NotLeader("this node stopped leading before the leaf was signed"))
            elif (error := done.exception()) is not None:
                self._suspect()
                if not isinstance(error, CaserverError):
                    _log.error("a leaf was not signed", issue_id=order.issue_id, exc_info=error)
                _fail(waiting, error)
            elif not waiting.result.done():
                waiting.result.set_result(done.result())

        task.add_done_callback(told)

    async def _signed_elsewhere(
        self, row: tuple[int, int, LedgerRow], order: SigningOrder, booked: _Booked, started: float
    ) -> IssuedLeaf:
        signing = booked.signing
        late = ProviderUnavailable(
            f"the CA provider did not sign within {DROP_AFTER:g} s, the leaf was dropped; try again"
        )
        left = DROP_AFTER - (self._clock.monotonic() - started)
        try:
            (result,) = await within(self._clock, max(0.0, left), signing.provider.sign_leaves([order]))
        except TimeoutError:
            raise late from None
        if self._clock.monotonic() - started > DROP_AFTER:  # the process may have stood still with the answer at hand
            raise late
        if isinstance(result, CaserverError):
            raise result
        self._require_booking(booked)  # nor is its row in the ledger the row of that number any more
        template = _template(order, result.serial)
        leaf = check_foreign_leaf(result.pem, template, signing.issuer_pem, now=int(self._clock.now().timestamp()))
        self._recorder.add(row[0], row[1], leaf.serial)
        return replace(
            _issued(row[2], order, SignedLeaf(order.issue_id, leaf.pem, leaf.serial), booked),
            not_before=leaf.not_before,
            not_after=leaf.not_after,
        )

    def _require_booking(self, booked: _Booked) -> None:
        """NotLeader if a restore took the bookings away while their leaves were signed."""
        if self._log.state.restored_index > booked.applied.index:
            raise NotLeader("the leaf was not signed: the cluster was restored, which took its booking away")

    async def _book(self, live: list[_Waiting]) -> _Booked:
        """Commit the batch; a batch decided on a stale epoch is proposed once more, unseen by its callers."""
        for last in (False, True):
            signing = self._custody.signing(self._log.state)
            _require_domain(live, signing)
            command, by_issue_id = self._command(live, signing)
            outcome = verdict(await self._log.propose(command))
            match outcome:
                case Applied() as applied:
                    return _Booked(signing, applied, by_issue_id, travelling=signing.travelling(command.at))
                case Refused(reason=reason) if reason in _STALE and not last:
                    continue
                case Refused() as refused:
                    raise Unavailable(f"the leaf was not booked: {refused.reason}; try again")
                case NotCommitted(reason=why):
                    raise CommitFailed(f"the leaf was not booked: {why}")
                case OutcomeUnknown(reason=why):
                    # Nothing was signed and nothing will be: for the caller this certainly did not happen.
                    raise NotLeader(f"the leaf was not signed, its booking is in doubt: {why}")
                case _:
                    assert_never(outcome)
        raise AssertionError("unreachable: the second round always ends")

    def _command(self, live: list[_Waiting], signing: Signing) -> tuple[IssueLeaves, dict[str, _Waiting]]:
        now = int(self._clock.now().timestamp())
        if signing.issuer_not_after <= now:
            raise Unavailable(
                f"the certificate that signs leaves ({signing.root.id}) has expired, no leaf under it would verify; "
                "set a configuration with another root"
            )
        if signing.issuer_not_before > now:
            raise Unavailable(
                f"the certificate that signs leaves ({signing.root.id}) is not valid before "
                f"{_utc(signing.issuer_not_before)}, by this node's clock that is later: no leaf under it would verify; "
                "set the clock right, or set a configuration with another root"
            )
        not_before = max(now - BACKDATED, signing.issuer_not_before)
        not_after = min(now - BACKDATED + signing.effective.leaf_ttl, signing.issuer_not_after)
        by_issue_id = {self._entropy.bytes(16).hex(): waiting for waiting in live}
        orders = tuple(
            LeafOrder(
                issue_id=issue_id,
                service=waiting.csr.service_id.service,
                serial=None if signing.chooses_serials else serial_from(self._entropy.bytes(16)),
                not_before=not_before,
                not_after=not_after,
            )
            for issue_id, waiting in by_issue_id.items()
        )
        command = IssueLeaves(at=now, root_id=signing.root.id, ca_epoch=signing.epoch, orders=orders)
        return command, by_issue_id

    def _deliver(
        self, row: LedgerRow, order: SigningOrder, result: SignedLeaf | CaserverError, booked: _Booked
    ) -> None:
        waiting = booked.by_issue_id[row.issue_id]
        if isinstance(result, CaserverError):
            _fail(waiting, result)
            return
        try:
            check_leaf(result.pem, _template(order, result.serial), booked.signing.issuer_pem)
        except RuntimeError as exc:
            _log.exception("a signed leaf is not what was booked; it was thrown away", issue_id=row.issue_id)
            _fail(waiting, exc)
            return
        if not waiting.result.done():
            waiting.result.set_result(_issued(row, order, result, booked))


def _require_domain(live: list[_Waiting], signing: Signing) -> None:
    """Unavailable if a restore changed the trust domain after the requests were checked."""
    if any(waiting.csr.service_id.trust_domain != signing.trust_domain for waiting in live):
        raise Unavailable("the cluster was restored and has another trust domain now; ask with a new request")


def _utc(instant: int) -> str:
    return f"{datetime.fromtimestamp(instant, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _order(row: LedgerRow, booked: _Booked, datacenter: str) -> SigningOrder:
    csr = booked.by_issue_id[row.issue_id].csr
    service = ServiceID(booked.signing.trust_domain, datacenter, row.service)
    return SigningOrder(
        issue_id=row.issue_id,
        serial=row.serial,
        spiffe_uri=service.uri,
        common_name=leaf_common_name(row.service, booked.signing.trust_domain),
        public_key=csr.public_key,
        csr_pem=csr.pem,
        not_before=row.not_before,
        not_after=row.not_after,
    )


def _issued(row: LedgerRow, order: SigningOrder, signed: SignedLeaf, booked: _Booked) -> IssuedLeaf:
    return IssuedLeaf(
        serial=signed.serial,
        chain_pem=signed.pem + booked.travelling,
        service=row.service,
        service_uri=order.spiffe_uri,
        not_before=row.not_before,
        not_after=row.not_after,
        root_id=booked.signing.root.id,
        signing_key_id=booked.signing.root.signing_key_id,
        index=booked.applied.index,
    )


def _template(order: SigningOrder, serial: int) -> LeafTemplate:
    return LeafTemplate(
        spiffe_uri=order.spiffe_uri,
        common_name=order.common_name,
        public_key=order.public_key,
        serial=serial if order.serial is None else order.serial,
        not_before=order.not_before,
        not_after=order.not_after,
    )


def _fail(waiting: _Waiting, error: BaseException) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)


def _fail_all(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        _fail(waiting, error)


def _results(entered: list[asyncio.Future[IssuedLeaf] | CaserverError]) -> tuple[IssuedLeaf | Failure, ...]:
    results: list[IssuedLeaf | Failure] = []
    unavailable: list[Unavailable] = []
    for each in entered:
        try:
            results.append(_result(each))
        except Unavailable as exc:
            unavailable.append(exc)
            results.append(Failure(kind=exc.kind, detail=exc.detail))
        except CaserverError as exc:
            results.append(Failure(kind=exc.kind, detail=exc.detail))
    if unavailable and not any(isinstance(result, IssuedLeaf) for result in results):
        raise unavailable[0]
    return tuple(results)


def _result(entered: asyncio.Future[IssuedLeaf] | CaserverError) -> IssuedLeaf:
    if isinstance(entered, CaserverError):
        raise entered
    return entered.result()
