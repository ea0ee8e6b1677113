"""What falls due while nobody asks: finish changes, renew what signs leaves, retire providers, prune roots, expire the ledger.

One step at a time on the leader, always decided anew from the state, so that a step that was interrupted anywhere is
simply due again. Rotation never cleans up inline: the path after a crash is the normal path.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import assert_never

import structlog

from caserver.authority.clock_guard import ClockGuard
from caserver.authority.custody import Custody, renewal_at
from caserver.authority.ports import Log, commit
from caserver.authority.resealing import Resealing
from caserver.authority.rotation import Rotation
from caserver.environment import Clock, within
from caserver.errors import CaserverError, Corrupt, InvalidConfig, ProviderRefused
from caserver.raft.ports import Leadership
from caserver.state.commands import ExpireLeaves, ProviderRetired, PruneRoots, RestoreAbort
from caserver.state.configuration import CAConfiguration, open_stored
from caserver.state.lifecycle import Expire, GiveUpRestore, Prune, RetireProvider, due, next_due
from caserver.state.model import CAState, Index, Retiring, RootID

LOOK_AGAIN = 5.0  # seconds after which a hindrance (a change under way, a doubtful clock, keys) is looked at again
REST_MIN = 1.0  # seconds
RETIRE_AGAIN, RETIRE_AGAIN_MAX = 60.0, 600.0  # seconds after which a provider that could not be retired is tried again
RENEW_AGAIN, RENEW_AGAIN_MAX = 30.0, 600.0  # seconds after which a signing certificate that could not be renewed is
BACKOFF_MAX = 60.0  # seconds between tries of a step that fails
_log = structlog.get_logger(__name__)

_Agenda = tuple[Index, tuple[Retiring, ...], str | None, str | None]


def agenda(state: CAState, _leadership: Leadership) -> _Agenda:
    """Selector of ``Log.changed``: what may make another step due at once."""
    change, restoring = state.change, state.restoring
    return (
        state.roots_index,
        state.retiring,
        None if change is None else change.request_id,
        None if restoring is None else restoring.request_id,
    )


class _Backoff:
    """When something that failed may be tried again, and why it failed."""

    def __init__(self, clock: Clock, least: float, most: float) -> None:
        self._clock = clock
        self._least, self._most = least, most  # seconds
        self._pause, self._from = least, float("-inf")
        self.reason = ""

    @property
    def rest(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._from - self._clock.monotonic())

    @property
    def ready(self) -> bool:
        """Whether it may be tried."""
        return self.rest <= 0

    def failed(self, reason: str) -> None:
        """Wait longer than the last time."""
        self.reason = reason
        self._from = self._clock.monotonic() + self._pause
        self._pause = min(self._most, 2 * self._pause)

    def over(self) -> None:
        """It went well, or there is nothing to do."""
        self.reason, self._pause, self._from = "", self._least, float("-inf")


class Maintenance:
    """Does what is due."""

    def __init__(
        self,
        log: Log,
        *,
        custody: Custody,
        rotation: Rotation,
        resealing: Resealing,
        clock: Clock,
        guard: ClockGuard,
        signer_lost: asyncio.Event,
    ) -> None:
        """``signer_lost`` is set while what signs leaves is gone from the provider's backend."""
        self._log = log
        self._resealing = resealing
        self._custody = custody
        self._rotation = rotation
        self._clock = clock
        self._guard = guard
        self._signer_lost = signer_lost
        self._retire: dict[tuple[RootID, int], _Backoff] = {}  # by what is owed: one backend may be gone for good
        self._renew = _Backoff(clock, RENEW_AGAIN, RENEW_AGAIN_MAX)

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """What could not be done: (code, reason) for operators."""
        found = [("IntermediateExpiring", self._renew.reason)]
        for retiring in self._log.state.retiring:
            if reason := self.why_owed(retiring):
                remedy = f"`caserver connect ca cleanup forget {retiring.id}` gives it up"
                found.append(("CleanupOwed", f"clean-up {retiring.id}: {reason}; it is tried again, {remedy}"))
        return tuple((code, reason) for code, reason in found if reason)

    def why_owed(self, retiring: Retiring) -> str:
        """Why the latest try of this node to clean up failed; empty if none did."""
        tries = self._retire.get((retiring.root_id, retiring.epoch))
        return "" if tries is None else tries.reason

    async def run(self) -> None:
        """Step after step until cancelled; what fails is tried again with back-off."""
        self._retire.clear()
        self._renew.over()
        failures = 0
        while True:
            try:
                if not await self.step():
                    await self._rest()
                failures = 0
            except (CaserverError, Corrupt) as exc:
                failures += 1
                _log.warning("maintenance failed, it will be tried again", reason=str(exc), failures=failures)
            except Exception:  # noqa: BLE001 - a bug in one step must not end the others; logged with its traceback
                failures += 1
                _log.exception("maintenance failed, it will be tried again", failures=failures)
            if failures:
                await self._clock.sleep(min(BACKOFF_MAX, 2.0 ** min(failures, 6)))

    async def step(self) -> bool:
        """Do the one thing that is due now; False if there is none."""
        state = self._log.state
        if self._guard.fault() is not None:
            return False
        if state.change is not None:
            return await self._finish_change()
        if await self._resealing.step() or await self._renew_intermediate(state):
            return True
        state, now = self._log.state, self._now()
        step = due(self._considered(state), now)
        if step is None or not self._guard.is_proven():
            return False
        match step:
            case RetireProvider(retiring=retiring):
                return await self._retired(retiring)
            case Prune(root_ids=root_ids):
                for root_id in root_ids:
                    _log.info("pruning old unused root CA", id=root_id)
                await commit(self._log, PruneRoots(at=now, expect_epoch=state.ca_epoch, root_ids=root_ids))
            case Expire():
                await commit(self._log, ExpireLeaves(at=now))
            case GiveUpRestore(request_id=request_id):
                _log.warning("giving up a restore whose pieces ceased to come", request_id=request_id)
                await commit(self._log, RestoreAbort(request_id=request_id, at=now))
            case _:
                assert_never(step)
        return True

    async def _finish_change(self) -> bool:
        if self._rotation.busy:
            return False
        await self._rotation.initialize()
        return True

    def _considered(self, state: CAState) -> CAState:
        """The state as far as it is up for maintenance now: a backend that fails must not hold up the rest."""
        ready = tuple(each for each in state.retiring if self._tries(each).ready)
        return state if ready == state.retiring else replace(state, retiring=ready)

    def _tries(self, retiring: Retiring) -> _Backoff:
        fresh = _Backoff(self._clock, RETIRE_AGAIN, RETIRE_AGAIN_MAX)
        return self._retire.setdefault((retiring.root_id, retiring.epoch), fresh)

    async def _renew_intermediate(self, state: CAState) -> bool:
        """Have the certificate that signs leaves made anew when its time has come; a failure is told, and tried again."""
        at = self._renewal(state)
        if at is None or self._now() < at:
            self._renew.over()
            return False
        if not self._renew.ready:
            return False
        try:
            renewed = await self._rotation.renew()
        except (CaserverError, Corrupt) as exc:
            expires = f"{datetime.fromtimestamp(self._custody.signing(state).issuer_not_after, UTC):%Y-%m-%dT%H:%M:%SZ}"
            lost = self._signer_lost.is_set()
            fate = "is gone and could not be made anew" if lost else f"expires at {expires} and could not be renewed"
            self._renew.failed(f"what signs leaves {fate}: {exc}")
            _log.warning("renewing what signs leaves failed, it will be tried again", reason=str(exc), expires=expires)
            return False
        if renewed:
            self._signer_lost.clear()  # until it is looked at again
        return renewed

    def _renewal(self, state: CAState) -> int | None:
        """When what signs leaves is to be renewed; None if that is the root, or cannot be told now."""
        try:
            signing = self._custody.signing(state)
        except (CaserverError, Corrupt):
            return None  # said elsewhere
        return self._now() if self._signer_lost.is_set() else renewal_at(signing)

    async def _retired(self, retiring: Retiring) -> bool:
        await self._log.barrier()  # there may be a successor, for whom this is not owed any more
        if self._rotation.busy:  # not looked at before that: who begins meanwhile may change what the state below says
            return False
        state = self._log.state
        if retiring not in state.retiring:
            return True
        try:
            await self._rotation.undisturbed(self._clean_up(state, retiring))
        except (CaserverError, Corrupt) as exc:
            self._tries(retiring).failed(f"cleaning up after a former CA provider failed: {exc}")
            _log.warning("retiring the former CA provider failed, it will be tried again", reason=str(exc))
            return False
        self._retire.pop((retiring.root_id, retiring.epoch), None)
        await commit(self._log, ProviderRetired(at=self._now(), root_id=retiring.root_id, epoch=retiring.epoch))
        _log.info("the former CA provider is retired", root_id=retiring.root_id, epoch=retiring.epoch)
        return True

    async def _clean_up(self, state: CAState, retiring: Retiring) -> None:
        root, active = state.root(retiring.root_id), state.active_root
        if root is not None:  # as it was when it was replaced: it may have come back, with other things at its backend
            root = replace(root, backend=retiring.backend)
        keep = None if active is None else MappingProxyType(dict(active.backend))
        configuration = open_stored(retiring.configuration, self._custody.keyring)

        async def retire(configuration: CAConfiguration) -> None:
            with self._custody.provider(configuration, root, trust_domain=state.trust_domain or "") as provider:
                await provider.retire(epochs=(retiring.epoch,), keep=keep)

        try:
            await retire(configuration)
        except (ProviderRefused, InvalidConfig):
            # Its credentials may have ended since: mostly that is why there are others now.
            renewed = self._with_present_credentials(state, configuration)
            if renewed is None:
                raise
            await retire(renewed)

    def _with_present_credentials(self, state: CAState, former: CAConfiguration) -> CAConfiguration | None:
        if state.configuration is None or former.vault is None:
            return None
        present = open_stored(state.configuration.stored, self._custody.keyring)
        vault = None if present.vault is None else former.vault.known_as(present.vault)
        return None if vault is None else replace(former, vault=vault)

    async def _rest(self) -> None:
        """Until something falls due, or the state gives another reason to look."""
        state = self._log.state
        hindered = state.change is not None or not self._guard.is_proven() or self._resealing.owed(state)
        pause = LOOK_AGAIN if hindered else max(REST_MIN, next_due(self._considered(state), self._now()))
        if state.retiring:
            pause = min(pause, max(REST_MIN, min(self._tries(each).rest for each in state.retiring)))
        renewal = self._renewal(state)
        if renewal is not None:
            pause = min(pause, max(REST_MIN, renewal - self._now(), self._renew.rest))
        with contextlib.suppress(TimeoutError):
            await within(self._clock, pause, self._roused(state))

    async def _roused(self, state: CAState) -> None:
        """Until the state gives a reason to look, or what signs leaves is found to be lost."""
        changed = asyncio.ensure_future(self._log.changed(agenda, agenda(state, self._log.leadership)))
        lost = asyncio.ensure_future(self._signer_lost.wait())
        waits = (changed,) if self._signer_lost.is_set() else (changed, lost)
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            changed.cancel()
            lost.cancel()

    def _now(self) -> int:
        return int(self._clock.now().timestamp())
