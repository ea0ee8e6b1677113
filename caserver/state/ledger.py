"""The ledger of issued leaves as a value: booking, eviction, serials, expiry. Pure; apply decides, this counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from immutables import Map, MapMutation

from caserver.state.commands import LeafOrder
from caserver.state.lifecycle import hour_is_over
from caserver.state.model import HOUR, CARoot, Index, Ledger, LedgerHour, LedgerRow, RootID, ServiceUse, UseKey

K = TypeVar("K")
V = TypeVar("V")
_NO_HOUR = LedgerHour(0, 0, Map())
_NO_KEYS: Map[UseKey, None] = Map()


def book(
    ledger: Ledger, orders: Iterable[LeafOrder], root_id: RootID, index: Index
) -> tuple[Ledger, tuple[tuple[int, int, LedgerRow], ...]]:
    """The ledger with ``orders`` booked at ``index``, within its bound, and (hour, number, row) of each order."""
    uses = _Uses(ledger)
    booked: list[tuple[int, int, LedgerRow]] = []
    numbers: dict[int, int] = {}
    rows: dict[int, MapMutation[int, LedgerRow]] = {}
    for order in orders:
        hour = order.not_after // HOUR
        if hour not in rows:
            within = ledger.hours.get(hour, _NO_HOUR)
            numbers[hour], rows[hour] = within.next, within.rows.mutate()
        number = numbers[hour]
        row = LedgerRow(order.issue_id, root_id, order.service, order.serial, order.not_before, order.not_after, index)
        rows[hour][number] = row
        numbers[hour] = number + 1
        booked.append((hour, number, row))
        uses.count((root_id, order.service), order)
    hours = ledger.hours.mutate()
    for hour, changed in rows.items():
        hours[hour] = LedgerHour(hours.get(hour, _NO_HOUR).first, numbers[hour], changed.finish())
    grown = replace(ledger, hours=hours.finish(), row_count=ledger.row_count + len(booked))
    return _evicted(uses.kept(grown)), tuple(booked)


def with_serials(ledger: Ledger, serials: Iterable[tuple[int, int, int]]) -> Ledger:
    """The ledger with (hour, number, serial) bound; rows that are gone or have a serial already are passed over."""
    hours, uses = ledger.hours, ledger.uses
    for hour, number, serial in serials:
        within = hours.get(hour, _NO_HOUR)
        row = within.rows.get(number)
        if row is None or row.serial is not None:
            continue
        hours = hours.set(hour, replace(within, rows=within.rows.set(number, replace(row, serial=serial))))
        use = uses.get((row.root_id, row.service))
        if use is not None:
            uses = uses.set((row.root_id, row.service), replace(use, last_serial=serial))
    return replace(ledger, hours=hours, uses=uses)


def expired(ledger: Ledger, now: int) -> Ledger:
    """The ledger without hours that are over at ``now`` and without services whose last leaf has expired."""
    over = [hour for hour in ledger.hours if hour_is_over(hour, now)]
    uses = _Uses(ledger)
    uses.drop_expiries([expiry for expiry in ledger.uses_by_expiry if expiry < now])
    rest = replace(
        ledger,
        hours=without(ledger.hours, over),
        row_count=ledger.row_count - sum(len(ledger.hours[hour].rows) for hour in over),
    )
    return uses.kept(rest)


def without_roots(ledger: Ledger, gone: Iterable[CARoot]) -> Ledger:
    """The ledger without the rows and totals of pruned roots (whose leaves have all expired)."""
    live_hours = {root.id: set(root.live_by_hour) for root in gone}
    hours, row_count = ledger.hours, ledger.row_count
    for hour in sorted(set().union(*live_hours.values())):
        within = hours.get(hour, _NO_HOUR)
        leaving = [number for number, row in within.rows.items() if row.root_id in live_hours]
        hours = hours.set(hour, replace(within, rows=without(within.rows, leaving)))
        row_count -= len(leaving)
    uses = _Uses(ledger)
    uses.drop([key for key in ledger.uses if key[0] in live_hours])
    return uses.kept(replace(ledger, hours=hours, row_count=row_count))


def without(found: Map[K, V], keys: Iterable[K]) -> Map[K, V]:
    """``found`` without ``keys``, all of which it must hold."""
    left = found.mutate()
    for key in keys:
        del left[key]
    return left.finish()


def by_expiry(uses: Map[UseKey, ServiceUse]) -> Map[int, Map[UseKey, None]]:
    """Totals by the instant at which the last leaf of each expires."""
    found: dict[int, list[tuple[UseKey, None]]] = {}
    for key, use in uses.items():
        found.setdefault(use.latest_not_after, []).append((key, None))
    return Map({expiry: Map(keys) for expiry, keys in found.items()})


def merged(ledger: Ledger, more: Ledger) -> Ledger:
    """The parts of one ledger put together; ValueError if the totals of a service come twice."""
    if not ledger.uses:
        expiries = more.uses_by_expiry
    else:
        if any(key in ledger.uses for key in more.uses):
            raise ValueError("the totals of a service come twice")
        expiries = ledger.uses_by_expiry
        for expiry, keys in more.uses_by_expiry.items():
            expiries = expiries.set(expiry, expiries.get(expiry, _NO_KEYS).update(keys))
    hours, row_count = ledger.hours.mutate(), ledger.row_count
    for hour, within in more.hours.items():
        known = hours.get(hour)
        joined = within if known is None else replace(known, rows=known.rows.update(within.rows))
        row_count += len(joined.rows) - (0 if known is None else len(known.rows))
        hours[hour] = joined
    return replace(
        ledger,
        hours=hours.finish(),
        row_count=row_count,
        uses=ledger.uses.update(more.uses),
        uses_by_expiry=expiries,
    )


class _Uses:
    """The totals of one ledger being changed, together with their order of expiry."""

    def __init__(self, ledger: Ledger) -> None:
        self._uses = ledger.uses.mutate()
        self._expiries = ledger.uses_by_expiry  # not a mutation: those cannot be iterated
        self._max = ledger.max_rows

    def count(self, key: UseKey, order: LeafOrder) -> None:
        """One more leaf."""
        use, latest, count = self._uses.get(key), order.not_after, 1
        if use is not None:
            latest, count = max(latest, use.latest_not_after), use.count + 1
        if use is None or use.latest_not_after != latest:
            if use is not None:
                self._leave(key, use)
            self._expiries = self._expiries.set(latest, self._expiries.get(latest, _NO_KEYS).set(key, None))
        self._uses[key] = ServiceUse(count, latest, order.serial)

    def drop(self, keys: Iterable[UseKey]) -> None:
        """Forget some."""
        for key in keys:
            self._leave(key, self._uses.pop(key))

    def drop_expiries(self, expiries: Iterable[int]) -> None:
        """Forget all whose last leaf expires at one of these instants."""
        for expiry in expiries:
            for key in self._expiries[expiry]:
                del self._uses[key]
            self._expiries = self._expiries.delete(expiry)

    def kept(self, ledger: Ledger) -> Ledger:
        """``ledger`` with these totals, within their bound: those that expire first go first."""
        while len(self._uses) > self._max:
            self.drop_expiries([min(self._expiries)])
        return replace(ledger, uses=self._uses.finish(), uses_by_expiry=self._expiries)

    def _leave(self, key: UseKey, use: ServiceUse) -> None:
        expiry = use.latest_not_after
        left = self._expiries[expiry].delete(key)
        self._expiries = self._expiries.set(expiry, left) if left else self._expiries.delete(expiry)


def _evicted(ledger: Ledger) -> Ledger:
    """The ledger within its bound: rows that expire first go first.

    An hour that was emptied stays until it is over, so that the number of a row is never given twice.
    """
    excess = ledger.row_count - ledger.max_rows
    if excess <= 0:
        return ledger
    hours = ledger.hours.mutate()
    left = excess
    for hour in sorted(hour for hour, within in ledger.hours.items() if within.rows):
        within = hours[hour]
        leaving, first = _oldest(within, left)
        hours[hour] = LedgerHour(first, within.next, without(within.rows, leaving))
        left -= len(leaving)
        if not left:
            break
    return replace(ledger, hours=hours.finish(), row_count=ledger.row_count - excess + left)


def _oldest(within: LedgerHour, count: int) -> tuple[list[int], int]:
    """Numbers of up to ``count`` rows booked first, and the number after them (pruning leaves gaps)."""
    leaving: list[int] = []
    number = within.first
    while number < within.next and len(leaving) < count:
        if number in within.rows:
            leaving.append(number)
        number += 1
    return leaving, number
