"""The judge of histories, on histories whose verdict is known."""

from __future__ import annotations

import random

import pytest

from tests.testkit.history import FOREVER, Kind, Operation, check


def read(value: str | None, invoked: float, returned: float) -> Operation:
    return Operation(Kind.READ, invoked, returned, value=value)


def write(value: str, invoked: float, returned: float = FOREVER) -> Operation:
    return Operation(Kind.WRITE, invoked, returned, value=value)


def cas(expected: str, value: str, invoked: float, returned: float = FOREVER) -> Operation:
    return Operation(Kind.CAS, invoked, returned, value=value, expected=expected)


def refused(expected: str, invoked: float, returned: float) -> Operation:
    return Operation(Kind.REFUSED, invoked, returned, expected=expected)


GOOD = {
    "nothing happened": [],
    "one after another": [read("0", 0, 1), write("a", 2, 3), read("a", 4, 5), cas("a", "b", 6, 7), read("b", 8, 9)],
    "a read that overlaps a write sees the old value": [write("a", 0, 10), read("0", 5, 6)],
    "or the new one": [write("a", 0, 10), read("a", 5, 6), read("a", 7, 8)],
    "overlapping writes in either order": [write("a", 0, 10), write("b", 0, 10), read("b", 11, 12), read("b", 13, 14)],
    "an unknown write that never happened": [write("a", 0), read("0", 5, 6), read("0", 50, 60)],
    "an unknown write that happened late": [write("a", 0), read("0", 5, 6), read("a", 50, 60)],
    "an unknown write of which only its trace is left": [
        write("a", 0),
        write("b", 5, 20),
        refused("0", 1, 3),
        read("b", 21, 22),
    ],
    "a refusal justified by an unseen unknown write": [write("a", 0), refused("0", 5, 6)],
    "of two equal compare-and-sets one wins": [cas("0", "a", 0, 5), refused("0", 0, 5), read("a", 6, 7)],
    "an unknown compare-and-set replaced by another": [cas("0", "a", 0), cas("a", "b", 4, 9), read("b", 10, 11)],
}
BAD = {
    "an acknowledged write is lost": [write("a", 0, 1), read("0", 2, 3)],
    "an acknowledged write is lost after it was seen": [write("a", 0, 1), read("a", 2, 3), read("0", 4, 5)],
    "a stale read after another client saw the new value": [write("a", 0, 10), read("a", 2, 3), read("0", 4, 5)],
    "a value from nowhere": [read("ghost", 0, 1)],
    "a value from the future": [read("a", 0, 1), write("a", 2, 3)],
    "two compare-and-sets of one value both win": [cas("0", "a", 0, 5), cas("0", "b", 0, 5)],
    "an acknowledged compare-and-set of a value that was gone": [write("a", 0, 1), cas("0", "b", 2, 3)],
    "a refusal without a reason": [refused("0", 0, 1)],
    "an unknown write that happened, unhappened and happened": [
        write("a", 0),
        read("a", 1, 2),
        write("b", 3, 4),
        read("b", 5, 6),
        read("a", 7, 8),
    ],
    "two readers disagree on the order of two writes": [
        write("a", 0, 10),
        write("b", 0, 10),
        read("a", 11, 12),
        read("b", 13, 14),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_possible_history_is_accepted(name: str) -> None:
    verdict = check(GOOD[name], initial="0")

    assert verdict.linearizable, verdict.reason


@pytest.mark.parametrize("name", BAD)
def test_an_impossible_history_is_refused(name: str) -> None:
    verdict = check(BAD[name], initial="0")

    assert not verdict.linearizable
    assert verdict.complete
    assert verdict.reason


def recorded(chance: random.Random, count: int) -> list[Operation]:
    """What five clients see of a real register: every operation takes effect at some moment between call and answer."""
    current, free = "0", [0.0] * 5
    history: list[Operation] = []
    for number in range(count):
        client = min(range(5), key=lambda each: free[each])
        effect = max([free[client], *(each.invoked for each in history[-1:])]) + chance.random()
        effect = max(effect, float(number))  # effects happen in the order of this loop
        invoked, returned = max(free[client], effect - chance.uniform(0, 3)), effect + chance.uniform(0, 3)
        free[client] = returned
        kind = chance.choice(["read", "read", "write", "cas", "lost", "void"])
        if kind == "read":
            history.append(read(current, invoked, returned))
        elif kind in {"write", "lost"}:
            current = f"v{number}"
            history.append(write(current, invoked, returned if kind == "write" else FOREVER))
        elif kind == "void":
            history.append(write(f"v{number}", invoked))
        elif chance.random() < 0.5:
            history.append(cas(current, f"v{number}", invoked, returned))
            current = f"v{number}"
        else:
            history.append(refused(f"older than {current}", invoked, returned))
    return history


def in_order(history: list[Operation]) -> list[Operation]:
    return sorted(history, key=lambda each: each.returned)


@pytest.mark.parametrize("seed", range(20))
def test_long_histories_of_a_real_register_are_accepted_and_a_late_stale_read_in_them_is_found(seed: int) -> None:
    history = recorded(random.Random(seed), 300)
    end = max(each.returned for each in history if each.returned != FOREVER)
    stale = next(each.value for each in in_order(history) if each.kind is Kind.WRITE and each.returned < end / 2)

    good, bad = (
        check(history, initial="0"),
        check([*history, read(stale, end + 5, end + 6)], initial="0", states_max=200_000),
    )

    assert good.linearizable, good.reason
    assert not bad.linearizable


def test_a_history_needs_unique_values() -> None:
    with pytest.raises(ValueError, match="unique"):
        check([write("a", 0, 1), write("a", 2, 3)], initial="0")
