"""Seals what is stored with the current cluster secret, once every node does so: one step of a change of the secret.

Nobody asks for it. The leader sees that something is sealed with another key than its current one and waits until every
listed node has announced the same current key; then one command replaces all of it. Compaction is each node's own.
"""

from __future__ import annotations

import structlog

from caserver.authority.custody import HMAC_KEY_PURPOSE, root_key_purpose
from caserver.authority.ports import Log, commit
from caserver.authority.preparation import NONCE_BYTES
from caserver.environment import Clock, Entropy
from caserver.errors import CaserverError, Corrupt
from caserver.internode.keyring import Keyring, Sealed, sealed_key_id
from caserver.state.commands import Reseal
from caserver.state.configuration import secret_purpose
from caserver.state.key_change import hindrance
from caserver.state.model import CAState
from caserver.state.sealing import sealed_values

AGAIN = 60.0  # seconds after which a failure is tried again
_BYTES_MAX = 128 << 10  # in one command, far below what the log takes; what is beyond it follows in the next one
_log = structlog.get_logger(__name__)


class Resealing:
    """Looks and acts when asked to; lives on the leader."""

    def __init__(self, log: Log, *, keyring: Keyring, clock: Clock, entropy: Entropy) -> None:
        self._log = log
        self._keyring = keyring
        self._clock = clock
        self._entropy = entropy
        self._not_before = 0.0  # monotonic
        self._said: str | None = None  # the hindrance that was logged

    def owed(self, state: CAState) -> bool:
        """Whether something is sealed with another key than the current one."""
        return bool(self._former(state))

    async def step(self) -> bool:
        """Seal anew what has to be, if that may be now; whether something was done. Failures are logged, and tried again."""
        state = self._log.state
        former = self._former(state)
        if not former or self._clock.monotonic() < self._not_before or self._is_hindered():
            return False
        try:
            await self._reseal(state, former)
        except (CaserverError, Corrupt) as exc:
            self._not_before = self._clock.monotonic() + AGAIN
            _log.warning("sealing the stored secrets anew failed, it will be tried again", reason=str(exc))
            return False
        return True

    @property
    def _current(self) -> str:
        return self._keyring.key_ids[0]

    def _former(self, state: CAState) -> dict[str, Sealed]:
        """What another key sealed, as much of it as goes into one command."""
        chosen, size = dict[str, Sealed](), 0
        for name, value in sealed_values(state).items():
            if sealed_key_id(value) != self._current and size < _BYTES_MAX:
                chosen[name] = value
                size += len(value)
        return chosen

    def _is_hindered(self) -> bool:
        reason = hindrance(self._log.leadership, self._current)
        if reason is not None and reason != self._said:
            _log.info("stored secrets wait to be sealed with the current key", key=self._current, reason=reason)
        self._said = reason
        return reason is not None

    async def _reseal(self, state: CAState, former: dict[str, Sealed]) -> None:
        values = tuple((name, self._renewed(name, value)) for name, value in former.items())
        command = Reseal(at=int(self._clock.now().timestamp()), expect_index=state.roots_index, values=values)
        await commit(self._log, command)
        _log.info("stored secrets are sealed with the current key", key=self._current, secrets=len(values))

    def _renewed(self, name: str, value: Sealed) -> Sealed:
        purpose = purpose_of(name)
        opened = self._keyring.open(value, purpose=purpose)
        return self._keyring.seal(opened, purpose=purpose, nonce=self._entropy.bytes(NONCE_BYTES))


def purpose_of(name: str) -> str:
    """The associated data of the value that ``state.sealing`` calls ``name``."""
    kind, _, rest = name.partition("/")
    match kind:
        case "hmac":
            return HMAC_KEY_PURPOSE
        case "root":
            return root_key_purpose(rest)
        case _:
            return secret_purpose(rest.rpartition("/")[2])
