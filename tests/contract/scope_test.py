"""Every carried recording is replayed, or there is a reason why not; every deliberate difference is one that README tells."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.contract.differences import COMMAND_DIFFERENCES, DIFFERENCES, FILE_DIFFERENCES, Difference, difference
from tests.contract.recordings import COMMANDS, FILES, OUT_OF_SCOPE, REQUESTS, RUNS, in_scope, out_of_scope

README = " ".join((Path(__file__).resolve().parents[2] / "README.md").read_text().split())
CARRIED = {**REQUESTS, **FILES, **COMMANDS, **RUNS}
REPLAYED_RUNS = {
    "c01-blocking-wakeup-on-rotation",
    "c02-effective-key-spelling",
    "c03-chain-verification",
    "c04-roots-blocking-across-prune",
}
RECORDED = 389  # all that were given but one time line of a fail-over, which the cluster tests measure


def test_every_recording_is_carried_once() -> None:
    assert len(CARRIED) == len(REQUESTS) + len(FILES) + len(COMMANDS) + len(RUNS) == RECORDED


def test_every_recording_is_replayed_or_has_a_reason() -> None:
    replayed = {*in_scope(REQUESTS), *in_scope(FILES), *in_scope(COMMANDS), *REPLAYED_RUNS}

    assert {name for name in CARRIED if out_of_scope(name) is None} == replayed
    assert set(RUNS) == REPLAYED_RUNS


@pytest.mark.parametrize("pattern", OUT_OF_SCOPE)
def test_every_reason_is_in_use(pattern: str) -> None:
    assert any(fnmatchcase(name, pattern) for name in CARRIED)


def test_every_difference_is_in_use() -> None:
    assert set(DIFFERENCES) <= {difference(name) for name in in_scope(REQUESTS)}
    assert set(FILE_DIFFERENCES) <= set(in_scope(FILES))
    assert set(COMMAND_DIFFERENCES) <= set(in_scope(COMMANDS))


@pytest.mark.parametrize("each", DIFFERENCES, ids=lambda each: each.recordings[0])
def test_every_difference_is_in_the_readme(each: Difference) -> None:
    for reason in each.reason.split("; "):
        assert reason in README
