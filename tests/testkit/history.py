"""Was what clients were told of a register with compare-and-set possible if it is one register? (linearizability)

After Wing and Gong, with Lowe's memoisation: search an order of the operations that respects real time and in which every
answer is right; the same set of operations done with the same value is not looked at twice. Values that are written are
unique. What makes it fast on long histories: a read (or a refused compare-and-set) that fits the value is taken at once, as
that can never be wrong; a write of unknown outcome whose value was seen has happened, before that was answered; one whose
value nobody saw matters only where it explains a refusal.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

FOREVER = math.inf


class Kind(enum.Enum):
    READ = "read"
    WRITE = "write"
    CAS = "cas"  # a write that requires ``expected``
    REFUSED = "refused"  # a compare-and-set that was told that the value was not ``expected``


@dataclass(frozen=True, slots=True)
class Operation:
    """One call that had, or may have had, an effect or told something. Calls that certainly had no effect are left out."""

    kind: Kind
    invoked: float
    returned: float = FOREVER  # FOREVER: the outcome is unknown
    value: str | None = None  # read or written
    expected: str | None = None
    who: str = ""

    def fits(self, current: str | None) -> bool:
        match self.kind:
            case Kind.READ:
                return self.value == current
            case Kind.WRITE:
                return True
            case Kind.CAS:
                return self.expected == current
            case Kind.REFUSED:
                return self.expected != current

    @property
    def changes(self) -> bool:
        return self.kind in {Kind.WRITE, Kind.CAS}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the search found."""

    linearizable: bool
    complete: bool = True  # False: given up after too many states, nothing is proven
    reason: str = ""
    states: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """A node of the search: all of the first ``low`` operations are done, of those after it the ones in ``beyond``."""

    low: int
    beyond: int  # bit n: operation low + n
    maybe: int  # bit n: the n-th write that may never have happened
    value: str | None


def check(history: Iterable[Operation], *, initial: str | None, states_max: int = 5_000_000) -> Verdict:
    """Judge a whole history that began when the register held ``initial``."""
    operations = sorted(history, key=lambda each: each.invoked)
    if (why := _impossible(operations, initial)) is not None:
        return Verdict(linearizable=False, reason=why)
    seen = _first_seen(operations)
    settled: list[Operation] = []
    maybe: list[Operation] = []
    for each in operations:
        if each.changes and each.returned == FOREVER and each.value not in seen:
            maybe.append(each)
        elif each.changes:
            settled.append(replace(each, returned=min(each.returned, seen.get(each.value, FOREVER))))
        elif each.returned != FOREVER:
            settled.append(each)
    return _Search(settled, maybe).run(initial, states_max)


def _impossible(operations: Sequence[Operation], initial: str | None) -> str | None:
    """A value that was told and that nobody wrote before the answer came."""
    written = {each.value: each.invoked for each in operations if each.changes}
    if len(written) != sum(1 for each in operations if each.changes):
        raise ValueError("a value was written twice: this check needs unique values")
    for each in operations:
        told = each.value if each.kind is Kind.READ else each.expected if each.kind is Kind.CAS else None
        if each.returned == FOREVER or told is None or told == initial:
            continue
        if told not in written:
            return f"{each} tells a value that was never written, or whose write certainly failed"
        if written[told] > each.returned:
            return f"{each} tells a value that was written later"
    return None


def _first_seen(operations: Sequence[Operation]) -> dict[str | None, float]:
    """When a value was first told: by a read, or by a compare-and-set that replaced it."""
    seen: dict[str | None, float] = {}
    for each in operations:
        if each.kind is Kind.READ and each.returned != FOREVER:
            seen[each.value] = min(seen.get(each.value, FOREVER), each.returned)
        if each.kind is Kind.CAS and each.returned != FOREVER:
            seen[each.expected] = min(seen.get(each.expected, FOREVER), each.returned)
    return seen


class _Search:
    def __init__(self, settled: list[Operation], maybe: list[Operation]) -> None:
        self._settled = settled
        self._maybe = maybe
        self._farthest = _Place(0, 0, 0, None)

    def run(self, initial: str | None, states_max: int) -> Verdict:
        first = _Place(0, 0, 0, initial)
        visited = {first}
        stack = [self._next(first)]
        while stack:
            if (place := next(stack[-1], None)) is None:
                stack.pop()
                continue
            if place.low == len(self._settled):
                return Verdict(linearizable=True, states=len(visited))
            if place in visited:
                continue
            visited.add(place)
            if len(visited) > states_max:
                return Verdict(linearizable=False, complete=False, reason="too many states", states=len(visited))
            self._farthest = max(self._farthest, place, key=lambda each: each.low)
            stack.append(self._next(place))
        if not self._settled:
            return Verdict(linearizable=True)
        return Verdict(linearizable=False, reason=self._why(), states=len(visited))

    def _next(self, place: _Place) -> Iterator[_Place]:
        """Places one operation further, the most promising first."""
        candidates, horizon = self._candidates(place)
        for at in candidates:
            operation = self._settled[at]
            if not operation.changes and operation.fits(place.value):
                yield self._done(place, at)
                return  # nothing can be gained by doing it later
        changing = [at for at in candidates if self._settled[at].changes]
        for at in sorted(changing, key=lambda each: self._settled[each].returned):
            if self._settled[at].fits(place.value):
                yield self._done(place, at)
        if any(
            self._settled[at].kind is Kind.REFUSED for at in candidates
        ):  # none fitted: only they need an unseen value
            yield from self._unseen(place, horizon)

    def _unseen(self, place: _Place, horizon: float) -> Iterator[_Place]:
        """Places after a write whose value nobody was told; of plain writes one is as good as another."""
        plain = False
        for number, operation in enumerate(self._maybe):
            if operation.invoked > horizon:
                return
            if place.maybe >> number & 1 or not operation.fits(place.value) or (plain and operation.kind is Kind.WRITE):
                continue
            plain = plain or operation.kind is Kind.WRITE
            yield replace(place, maybe=place.maybe | 1 << number, value=operation.value)

    def _candidates(self, place: _Place) -> tuple[list[int], float]:
        """What may come next: not done, and begun before anything else that is not done had ended."""
        horizon = FOREVER
        found: list[int] = []
        for at in range(place.low, len(self._settled)):
            operation = self._settled[at]
            if operation.invoked > horizon:
                break
            if not place.beyond >> (at - place.low) & 1:
                found.append(at)
                horizon = min(horizon, operation.returned)
        return [at for at in found if self._settled[at].invoked <= horizon], horizon

    def _done(self, place: _Place, at: int) -> _Place:
        operation = self._settled[at]
        low, beyond = place.low, place.beyond | 1 << (at - place.low)
        while beyond & 1:
            low, beyond = low + 1, beyond >> 1
        return _Place(low, beyond, place.maybe, operation.value if operation.changes else place.value)

    def _why(self) -> str:
        at = self._farthest
        candidates, _ = self._candidates(at)
        stuck = "; ".join(str(self._settled[each]) for each in candidates[:4])
        return f"with the value {at.value!r}, after {at.low} operations, none of these fits: {stuck}"
