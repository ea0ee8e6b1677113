"""The ledger of issued leaves as a value: booking, eviction, serials, expiry. Pure; apply decides, this counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from immutables import Map, MapMutation

from caserver.state.commands import LeafOrder
from caserver.state.lifecycle import hour_is_over
from caserver.state.model import HOUR, CARoot, Index, Ledger, LedgerHour, LedgerRow, RootID, ServiceUse

K = TypeVar("K")
V = TypeVar("V")
_NO_HOUR = LedgerHour(0, 0, Map())


def book(
    ledger: Ledger, orders: Iterable[LeafOrder], root_id: RootID, index: Index
) -> tuple[Ledger, tuple[tuple[int, int, LedgerRow], ...]]:
    """The ledger with ``orders`` booked at ``index``, within its bound, and (hour, number, row) of each order."""
    uses = ledger.uses.mutate()
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
        uses[root_id, order.service] = _used(uses.get((root_id, order.service)), order)
    hours = ledger.hours.mutate()
    for hour, changed in rows.items():
        hours[hour] = LedgerHour(hours.get(hour, _NO_HOUR).first, numbers[hour], changed.finish())
    grown = Ledger(hours.finish(), ledger.row_count + len(booked), uses.finish(), ledger.max_rows)
    return _evicted(grown), tuple(booked)


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
    return replace(
        ledger,
        hours=without(ledger.hours, over),
        row_count=ledger.row_count - sum(len(ledger.hours[hour].rows) for hour in over),
        uses=without(ledger.uses, [key for key, use in ledger.uses.items() if use.latest_not_after < now]),
    )


def without_roots(ledger: Ledger, gone: Iterable[CARoot]) -> Ledger:
    """The ledger without the rows and totals of pruned roots (whose leaves have all expired)."""
    live_hours = {root.id: set(root.live_by_hour) for root in gone}
    hours, row_count = ledger.hours, ledger.row_count
    for hour in sorted(set().union(*live_hours.values())):
        within = hours.get(hour, _NO_HOUR)
        leaving = [number for number, row in within.rows.items() if row.root_id in live_hours]
        hours = hours.set(hour, replace(within, rows=without(within.rows, leaving)))
        row_count -= len(leaving)
    uses = without(ledger.uses, [key for key in ledger.uses if key[0] in live_hours])
    return replace(ledger, hours=hours, row_count=row_count, uses=uses)


def without(found: Map[K, V], keys: Iterable[K]) -> Map[K, V]:
    """``found`` without ``keys``, all of which it must hold."""
    left = found.mutate()
    for key in keys:
        del left[key]
    return left.finish()


def _used(use: ServiceUse | None, order: LeafOrder) -> ServiceUse:
    if use is None:
        return ServiceUse(1, order.not_after, order.serial)
    return ServiceUse(use.count + 1, max(use.latest_not_after, order.not_after), order.serial)


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
