"""Gathers what the parts of this node counted, under the names of ``telemetry.metrics``.

Consul's JSON shows the last whole interval of ten seconds; Prometheus takes totals and makes the intervals itself. Gauges
are of the moment in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from caserver.authority.custody import signer_of
from caserver.authority.operations import Operations, servers
from caserver.authority.ports import Log, Raft
from caserver.environment import Clock
from caserver.errors import Unavailable
from caserver.pki.certificates import describe
from caserver.raft.status import RaftStatus
from caserver.state.model import CAState
from caserver.telemetry import metrics
from caserver.telemetry.metrics import Kind, Reading, Totals, readings_of

INTERVAL = 10.0  # seconds (Consul's)
_Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class _Interval:
    """Counters and samples of one interval."""

    ended: datetime
    seconds: float
    readings: tuple[Reading, ...]


class Telemetry:
    """The metrics of one node."""

    def __init__(
        self,
        log: Log,
        raft: Raft,
        *,
        clock: Clock,
        operations: Operations,
        requests: Mapping[tuple[str, str, int], int],
        cached: Callable[[], int],
        blocked: Callable[[], int],
        token_expires_at: Callable[[], float | None] = lambda: None,
        degraded: Callable[[], Sequence[tuple[str, str]]] = tuple,
        tls_end: Callable[[], datetime | None] = lambda: None,
    ) -> None:
        """``requests`` is counted by the server: (path, method, status) -> answers.

        ``token_expires_at`` is of the CA provider's token, epoch seconds; ``degraded`` is what readiness shows of the CA;
        ``tls_end`` says when the certificate of HTTPS expires, None without one.
        """
        self._log = log
        self._raft = raft
        self._clock = clock
        self._operations = operations
        self._requests = requests
        self._cached = cached
        self._blocked = blocked
        self._token_expires_at = token_expires_at
        self._degraded = degraded
        self._tls_end = tls_end
        self._begun = clock.monotonic()
        self._before: dict[_Key, float | Totals] = {}
        self._last: _Interval | None = None

    async def run(self) -> None:
        """Close one interval after the other; until cancelled."""
        while True:
            await self._clock.sleep(INTERVAL)
            with suppress(Unavailable):
                await self._close_interval()

    async def totals(self) -> list[Reading]:
        """Everything as it is now."""
        return self._all(await self._raft.status())

    async def interval(self) -> tuple[datetime, float, list[Reading]]:
        """End and length (seconds) of the last whole interval, its counters and samples, and the gauges of now."""
        readings = await self.totals()
        last = self._last
        if last is None:  # the first one is not over yet: what there is so far
            last = _Interval(self._clock.now(), self._clock.monotonic() - self._begun, self._counted(readings))
        gauges = [each for each in readings if each.metric.kind is Kind.GAUGE]
        return last.ended, last.seconds, [*gauges, *last.readings]

    async def _close_interval(self) -> None:
        readings = self._all(await self._raft.status(restart=True))
        now = self._clock.monotonic()
        self._last = _Interval(self._clock.now(), now - self._begun, self._counted(readings))
        self._begun = now
        self._before = {_key(each): each.value for each in readings}

    def _counted(self, readings: Sequence[Reading]) -> tuple[Reading, ...]:
        """What was counted and measured since the last interval ended."""
        return tuple(
            replace(each, value=_since(each.value, self._before.get(_key(each))))
            for each in readings
            if each.metric.kind is not Kind.GAUGE
        )

    def _all(self, status: RaftStatus) -> list[Reading]:
        now = self._clock.now().timestamp()
        found = _of_state(self._log.state, now) + _of_raft(status)
        if status.leadership.is_leader:
            cluster = servers(status, now=now)
            found.append(Reading(metrics.AUTOPILOT_HEALTHY, int(cluster.healthy)))
            found.append(Reading(metrics.FAILURE_TOLERANCE, cluster.failure_tolerance))
        expires = self._token_expires_at()
        if expires is not None:
            found.append(Reading(metrics.TOKEN_EXPIRY, float(int(expires - now))))
        found += [
            *readings_of(metrics.DEGRADED, {code: 1 for code, _ in self._degraded()}),
            Reading(metrics.LEAVES_SIGNED, self._operations.signed),
            *readings_of(metrics.CSR_REFUSED, self._operations.refused),
            Reading(metrics.CACHE_ENTRIES, self._cached()),
            Reading(metrics.HTTP_BLOCKED, self._blocked()),
        ]
        if (end := self._tls_end()) is not None:
            found.append(Reading(metrics.TLS_EXPIRY, end.timestamp() - now))
        for (path, method, code), count in sorted(self._requests.items()):
            labels = {"path": path, "method": method, "status": str(code)}
            found.append(Reading(metrics.HTTP_REQUESTS, count, labels))
        return found


def _key(reading: Reading) -> _Key:
    return reading.metric.name, tuple(reading.labels.items())


def _since(value: float | Totals, before: float | Totals | None) -> float | Totals:
    if isinstance(value, Totals):
        return value.since(before) if isinstance(before, Totals) else value
    return value - before if isinstance(before, int | float) else value


def _of_state(state: CAState, now: float) -> list[Reading]:
    """What every node knows from the replicated state."""
    found = [Reading(metrics.LEDGER_LEAVES, state.ledger.row_count)]
    root = state.active_root
    if root is not None:
        signer_ends = describe(signer_of(root)).not_after if root.intermediates else root.not_after
        found += [
            Reading(metrics.ROOT_EXPIRY, float(int(root.not_after - now))),
            Reading(metrics.SIGNING_EXPIRY, float(int(signer_ends - now))),
        ]
    return found


def _of_raft(status: RaftStatus) -> list[Reading]:
    leadership = status.leadership
    found = [
        Reading(metrics.IS_LEADER, int(leadership.is_leader)),
        Reading(metrics.TERM, leadership.term),
        Reading(metrics.VOTER, int(leadership.is_voter)),
        Reading(metrics.LAST_INDEX, status.last_index),
        Reading(metrics.COMMIT_INDEX, status.commit_index),
        Reading(metrics.APPLIED_INDEX, status.applied_index),
        Reading(metrics.QUEUE, status.queue),
        Reading(metrics.LEADER_CONTACT, leadership.last_contact * 1000),
        Reading(metrics.CAMPAIGNS, status.campaigns),
        Reading(metrics.WINS, status.wins),
        Reading(metrics.LEADER_CHANGES, status.leader_changes),
        Reading(metrics.COMMIT_TIME, status.commit),
        Reading(metrics.APPLY_TIME, status.apply),
        Reading(metrics.FSYNC_TIME, status.fsync),
        *readings_of(metrics.REFUSED_MESSAGES, status.refused),
        *readings_of(metrics.LINK_EVENTS, status.links),
    ]
    for name, peer in sorted(status.peers.items()):
        labels = {"peer": name}
        found.append(Reading(metrics.PEER_CONNECTED, int(peer.connected), labels))
        if peer.last_contact is not None:
            found.append(Reading(metrics.PEER_CONTACT, peer.last_contact * 1000, labels))
        if leadership.is_leader:
            found.append(Reading(metrics.PEER_LAG, max(0, status.last_index - peer.last_index), labels))
    return found
