"""What time alone makes due, and when: pure questions about a state and an instant.

Instants are whole seconds since the epoch. The answers of ``due`` are intentions; the command that follows from one is
checked again by apply, with the same rules from this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from caserver.raft.ports import Leadership
from caserver.state.model import (
    HOUR,
    REQUEST_IDS_KEPT,
    REQUEST_IDS_MIN,
    RESTORE_IDLE,
    CARoot,
    CAState,
    Index,
    RequestRecord,
    Restoring,
    Retiring,
    RootID,
)

RENEW_WINDOW_MIN = 30.0  # seconds; Consul spreads renewals after a root change over this much
RENEW_PAUSE_MIN = 5.0  # seconds from one renewal of a leaf to the next at least
IDLE = float(HOUR)  # seconds; longest wait between two looks at the state
_RENEW_FROM, _RENEW_UNTIL = 0.6, 0.9  # share of a leaf's life


@dataclass(frozen=True, slots=True)
class RetireProvider:
    """Clean up after a replaced provider, then say so with ``ProviderRetired``."""

    retiring: Retiring


@dataclass(frozen=True, slots=True)
class Prune:
    """Drop these roots with ``PruneRoots``."""

    root_ids: tuple[RootID, ...]


@dataclass(frozen=True, slots=True)
class Expire:
    """Forget what has expired with ``ExpireLeaves``."""


@dataclass(frozen=True, slots=True)
class GiveUpRestore:
    """Forget with ``RestoreAbort`` what a node that died was bringing in."""

    request_id: str


Due = RetireProvider | Prune | Expire | GiveUpRestore


def due(state: CAState, now: int) -> Due | None:
    """The one step that maintenance should take next, or None. A change in progress puts pruning off."""
    if state.restoring is not None and is_idle(state.restoring, now):
        return GiveUpRestore(state.restoring.request_id)
    for retiring in state.retiring:
        if now >= retiring.not_before:
            return RetireProvider(retiring)
    prunable = tuple(root.id for root in state.roots if may_prune(root, now))
    if prunable and state.change is None:
        return Prune(prunable)
    return Expire() if any(instant <= now for instant in _expiries(state)) else None


def next_due(state: CAState, now: int) -> float:
    """Seconds until ``due`` may have something to say (0 = now), at most ``IDLE``."""
    instants = [retiring.not_before for retiring in state.retiring]
    if state.restoring is not None:
        instants.append(now if is_idle(state.restoring, now) else state.restoring.at + RESTORE_IDLE)
    if state.change is None:
        instants += [kept + 1 for root in state.roots if (kept := kept_until(root)) is not None]
    instants += _expiries(state)
    return max(0.0, min([float(instant - now) for instant in instants] + [IDLE]))


def is_idle(restoring: Restoring, now: int) -> bool:
    """Whether a restore has gone without another piece for too long; also if its latest piece came by a clock that was off."""
    return abs(now - restoring.at) >= RESTORE_IDLE


def kept_until(root: CARoot) -> int | None:
    """Last instant at which a rotated-out root is still needed; None for an active root, which always is.

    Twice the longest leaf lifetime since it was rotated out, and every leaf booked under it has expired (Consul counts
    with the lifetime configured now, which may be shorter than that of leaves still in use).
    """
    if root.active or root.rotated_out_at is None:
        return None
    return max(root.rotated_out_at + 2 * root.leaf_ttl_max, root.leaf_not_after_max)


def may_prune(root: CARoot, now: int) -> bool:
    """Whether nothing needs the root any more."""
    last = kept_until(root)
    return last is not None and now > last


def hour_is_over(hour: int, now: int) -> bool:
    """Whether every leaf that expires within this hour of the ledger has expired."""
    return (hour + 1) * HOUR <= now


def _expiries(state: CAState) -> Iterator[int]:
    """Instants from which on something can be forgotten."""
    for hour in state.ledger.hours:
        yield (hour + 1) * HOUR
    for request_id in earlier(state.requests):
        yield state.requests[request_id].at + REQUEST_IDS_KEPT + 1
    if state.acl.next_expiry is not None:
        yield state.acl.next_expiry


def earlier(requests: Mapping[str, RequestRecord]) -> list[str]:
    """The ids but for the latest ``REQUEST_IDS_MIN``, in the order of the log: those that time makes forgotten."""
    if len(requests) <= REQUEST_IDS_MIN:
        return []
    return sorted(requests, key=lambda request_id: requests[request_id].index)[:-REQUEST_IDS_MIN]


def live_services(state: CAState, now: int) -> int:
    """How many services hold a leaf that has not expired."""
    return len({service for (_, service), use in state.ledger.uses.items() if use.latest_not_after > now})


def renew_window(state: CAState, now: int) -> float:
    """Seconds over which leaves move to a new root: 30, or as long as the CSR limit makes it take."""
    limit = state.configuration.stored.effective.csr_max_per_second if state.configuration else 0.0
    if limit <= 0:
        return RENEW_WINDOW_MIN
    return max(RENEW_WINDOW_MIN, live_services(state, now) / limit)


def renew_at(not_before: int, not_after: int, jitter: float, *, now: float) -> float:
    """Instant to renew a leaf received at ``now``: 60 % of its life for jitter 0, 90 % for jitter 1.

    Leaves are backdated: most of a short life may be over when it begins. Some seconds always lie between two renewals.
    """
    wanted = not_before + (not_after - not_before) * (_RENEW_FROM + (_RENEW_UNTIL - _RENEW_FROM) * jitter)
    return max(wanted, now + RENEW_PAUSE_MIN)


def roots_index(state: CAState, leadership: Leadership) -> Index:  # noqa: ARG001 -- one signature for all selectors
    """Selector: the index that a blocking query on the roots waits for."""
    return state.roots_index


def epoch(state: CAState, leadership: Leadership) -> int:  # noqa: ARG001 -- one signature for all selectors
    """Selector: changes with the active root or its signing certificate."""
    return state.ca_epoch


def leader_of(state: CAState, leadership: Leadership) -> str | None:  # noqa: ARG001 -- one signature for all selectors
    """Selector: the leader's name as far as this node knows."""
    return leadership.leader
