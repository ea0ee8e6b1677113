"""What "truncating already-applied log entries ... state machine may have diverged" means here: nothing was truncated.

pysyncobj 0.3.17 logs it while it takes an append_entries whose place (``prevLogIdx``) lies before the last applied entry. It
then deletes every entry behind that place and adds those of the message, without comparing them first. Such messages are
ordinary: a heartbeat that was sent while earlier entries were under way, entries sent again after a reset, a new leader
feeling for the end of a follower's log, anything that comes twice or late. Under load there are a few a minute.

With pysyncobj's own journals the line tells of real damage: committed entries are gone from this node's log until somebody
sends them again, the commit index goes back with them, and if the leader dies meanwhile an acknowledged write may be lost.
(The state itself does not change: what was applied stays applied, the log below it is what is missing.)

With ours it is not true, for these reasons, each of which is tested here or in ``raft_journal_test``:

* ``Journal.deleteEntriesFrom`` hides entries until the message has been handled. ``add`` shows an entry again if index and
  term are the same; it cuts only where the terms differ, which is where Raft proves that the old entry never commits.
* At or below the commit index it never cuts: such a contradiction stops the node (``Corrupt``). What is applied is
  committed, so an applied entry is never truncated, nor applied anew as another one.
* ``Guard`` puts the commit index back that pysyncobj lowered to the hidden end; the durable hint never goes back.
* What the node answers counts only as far as the message reached, so nobody takes hidden entries for acknowledged ones.

The line is therefore kept out of the log (``seam``). The simulator counts how often it would have been written and
compares logs and states at every step; the variant of the journal that deletes as pysyncobj means it is found at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pysyncobj.syncobj
import pytest

from tests.sim.planted import PLANTED
from tests.sim.world import TRUNCATING, simulate
from tests.testkit.raftlab import Lab, committed


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What pysyncobj would have logged about truncation."""
    lines: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(TRUNCATING):
            lines.append(record.getMessage())
        return True

    logger = logging.getLogger(pysyncobj.syncobj.__name__)
    logger.filters.insert(0, hear)
    yield lines
    logger.filters.remove(hear)


def late_heartbeat(lab: Lab, *, place: int) -> dict[str, object]:
    """What the leader ``A`` may have sent long ago, and what arrives now."""
    entry = lab["A"].engine._core.entry(place)
    assert entry is not None
    term = lab["A"].term
    return {
        "type": "append_entries",
        "term": term,
        "commit_index": place,
        "prevLogIdx": place,
        "prevLogTerm": entry[2],
        "entries": [],
    }


def test_a_late_message_says_so_and_takes_nothing_away(said: list[str]):
    lab = Lab("ABC")
    lab.elect("A")
    committed(lab, "A", 8)
    follower = lab["B"]
    before = (follower.log(), follower.machine.state, follower.engine._core.commit_index())
    applied = follower.engine.applied_index
    on_disk = follower.disk.read("raft.log")

    follower.engine.receive("A", late_heartbeat(lab, place=applied - 5))
    follower.engine.tick()

    assert len(said) == 1
    assert f"(last applied: {applied})" in said[0]
    assert (follower.log(), follower.machine.state, follower.engine._core.commit_index()) == before
    assert follower.disk.read("raft.log") == on_disk


def test_a_follower_that_said_so_holds_all_if_the_leader_dies_then(said: list[str]):
    lab = Lab("ABC")
    lab.elect("A")
    committed(lab, "A", 8)
    state = lab["A"].machine.state
    for name in "BC":
        lab[name].engine.receive("A", late_heartbeat(lab, place=lab[name].engine.applied_index - 5))
        lab[name].engine.tick()
    lab.crash("A", power_loss=True)

    lab.elect("B", voters="C")
    lab["B"].propose("after")
    lab.settle()
    lab.run(0.2)

    assert len(said) >= 2
    assert lab["B"].machine.state == lab["C"].machine.state == (*state, "after")


def test_clusters_that_say_so_never_diverge():
    reports = [simulate(seed, steps=40, nodes=nodes) for seed, nodes in ((1, 3), (2, 5), (3, 3))]

    assert [report.violation for report in reports] == [None, None, None]
    assert sum(report.counts.get(TRUNCATING, 0) for report in reports) > 0
    assert sum(report.counts["states compared"] for report in reports) > 0


def test_a_journal_that_believes_it_loses_committed_entries():
    deletes = PLANTED["a journal that deletes where pysyncobj says so"]

    assert any(simulate(seed, nodes=5, parts=deletes).violation for seed in range(1, 6))
