"""Looks after the provider in force, on the leader: tokens, the health of its backend, what will soon be amiss.

The provider says when it wants to be asked again and what troubles it. Troubles are shown to operators as long as they
last, and logged when they come and when they go. Nothing here can keep the CA from signing.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from caserver.authority.custody import Custody, Signing
from caserver.authority.ports import Log, Tended
from caserver.environment import Clock, within
from caserver.errors import CaserverError, Corrupt, NotInitialized
from caserver.raft.ports import Leadership
from caserver.state.model import CAState, Index

PATIENCE = 30.0  # seconds that one look may take
REST_MIN, REST_MAX = 1.0, 3600.0  # seconds between two looks
AGAIN = 15.0  # seconds after a look that failed

_log = structlog.get_logger(__name__)

_InForce = tuple[int, Index]


def in_force(state: CAState, _leadership: Leadership) -> _InForce:
    """Selector of ``Log.changed``: another provider, signing certificate or configuration."""
    return state.ca_epoch, Index(0) if state.configuration is None else state.configuration.modify_index


class Tending:
    """The loop, and what it found last."""

    def __init__(self, log: Log, *, custody: Custody, clock: Clock) -> None:
        self._log = log
        self._custody = custody
        self._clock = clock
        self._troubles: tuple[tuple[str, str], ...] = ()
        self._suspicion = asyncio.Event()
        self.signer_lost = asyncio.Event()  # set while what signs leaves is gone from the backend
        self.token_expires_at: float | None = None  # epoch seconds; None: there is no token, or it never expires

    @property
    def troubles(self) -> tuple[tuple[str, str], ...]:
        """What the provider in force complains of: (code, reason)."""
        return self._troubles

    def suspect(self) -> None:
        """A signature failed: look soon, not only when it is due."""
        self._suspicion.set()

    async def run(self) -> None:
        """Look again and again until cancelled."""
        try:
            while True:
                seen = in_force(self._log.state, self._log.leadership)
                self._suspicion.clear()
                rest = await self.look()
                with contextlib.suppress(TimeoutError):
                    await within(self._clock, rest, self._roused(seen))
        finally:
            self._found(Tended(REST_MAX))

    async def _roused(self, seen: _InForce) -> None:
        """Until something else is in force, or what is has come under suspicion since the look before."""
        changed = asyncio.ensure_future(self._log.changed(in_force, seen))
        suspected = asyncio.ensure_future(self._suspected())
        try:
            done, _ = await asyncio.wait((changed, suspected), return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
        finally:
            changed.cancel()
            suspected.cancel()

    async def _suspected(self) -> None:
        await self._clock.sleep(REST_MIN)
        await self._suspicion.wait()

    async def look(self) -> float:
        """One look; seconds until the next."""
        try:
            signing = self._custody.signing(self._log.state)
        except NotInitialized:
            return AGAIN  # said elsewhere
        except (CaserverError, Corrupt) as exc:
            self._found(Tended(AGAIN, (("CATrouble", str(exc)),)))
            return AGAIN
        tended = await self._asked(signing)
        self._found(tended)
        return min(REST_MAX, max(REST_MIN, tended.next_in))

    async def _asked(self, signing: Signing) -> Tended:
        try:
            return await within(self._clock, PATIENCE, signing.provider.tend(self._clock.now()))
        except TimeoutError:
            trouble = ("ProviderUnavailable", f"the CA provider did not answer within {PATIENCE:g} s")
        except CaserverError as exc:
            trouble = (exc.kind, exc.detail)
        except Exception:  # noqa: BLE001 - a bug here must not end the office; logged with its traceback
            _log.exception("looking after the CA provider failed, it will be tried again")
            trouble = ("ProviderUnknown", "looking after the CA provider failed, see the log of the leader")
        return Tended(AGAIN, (trouble,), self.token_expires_at)

    def _found(self, tended: Tended) -> None:
        before, now = dict(self._troubles), dict(tended.troubles)
        for code in now.keys() - before.keys():
            _log.warning("the CA provider is in trouble", code=code, reason=now[code])
        for code in before.keys() - now.keys():
            _log.info("a trouble of the CA provider is over", code=code)
        self._troubles, self.token_expires_at = tended.troubles, tended.token_expires_at
        if tended.signer_lost:
            self.signer_lost.set()
        else:
            self.signer_lost.clear()
