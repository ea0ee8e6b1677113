"""The message rules against the defects of the bare package: each scenario fails there, as shown, and holds here."""

from __future__ import annotations

import struct

import pytest
from pysyncobj.journal import MemoryJournal

from caserver.errors import Corrupt
from caserver.raft import journal as journal_module
from caserver.raft.disk import MemoryDisk
from caserver.raft.guard import Standing
from caserver.raft.journal import Journal
from caserver.raft.ports import Committed
from tests.testkit.raftlab import TIMING, Lab, committed
from tests.testkit.stockraft import StockCluster

# -- S1: an append_entries that is delivered again must not erase what came after it


def test_stock_a_repeated_message_erases_acknowledged_entries():
    stock = StockCluster("ABC")
    stock.elect("A", "B")
    stock.queues[("A", "C")].clear()
    stock.pump("A", "B")
    outcomes: list[int] = []
    for number in range(5):
        stock.propose("A", f"k{number}" + "v" * 50, outcomes)
    stock.heartbeat("A")
    stock.heartbeat("A")
    first = next(each for each in stock.queues[("A", "B")] if each.get("entries"))
    stock.pump("A", "B", rounds=10)
    assert outcomes == [0] * 5
    before = stock["B"].log()
    stock.receive("A", "B", first)
    assert stock["B"].log() != before
    stock.clear()
    stock.elect("B", "C")  # A is gone
    stock.pump("B", "C")
    assert len(stock["B"].applied) < len(outcomes)


def test_a_repeated_message_erases_nothing_and_no_acknowledged_command_is_lost():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("C")
    for number in range(5):
        lab["A"].propose(f"k{number}")
    saved = [each for each in lab.wire.queues[("A", "B")] if each.get("entries")]
    lab.exchange("A", "B")
    assert [type(each) for each in lab["A"].outcomes] == [Committed] * 5
    before = lab["B"].log()
    lab["B"].engine.receive("A", saved[0])
    lab["B"].engine.tick()
    assert lab["B"].log() == before
    lab.crash("A")
    lab.mend()
    lab.elect("B", "C")
    lab.run(0.1)
    assert lab["B"].machine.state == lab["C"].machine.state == ("k0", "k1", "k2", "k3", "k4")


# -- S1b: the same on links that keep the order: two heartbeats meet a follower that is behind


def test_stock_a_follower_that_catches_up_loses_entries_again():
    stock = StockCluster("ABC")
    stock.elect("A", "B")
    for number in range(6):
        stock.propose("A", f"k{number}" + "v" * 50, [])
        for _ in range(3):
            stock.heartbeat("A")
            stock.deliver("A", "B")
            stock.deliver("B", "A")
            stock.queues[("A", "C")].clear()
    stock.heartbeat("A")
    stock.heartbeat("A")
    stock.deliver("A", "C")
    lengths = []
    for _ in range(40):
        stock.deliver("C", "A", count=1)
        stock.heartbeat("A")
        while stock.queues[("A", "C")]:
            stock.deliver("A", "C", count=1)
            lengths.append(len(stock["C"].log()))
    assert lengths != sorted(lengths)


def test_a_follower_that_catches_up_never_loses_an_entry_again():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("C")
    for number in range(6):
        lab["A"].propose(f"k{number}")
        lab.exchange("A", "B", rounds=3)
    lab.mend()
    for _ in range(2):
        lab.clock.elapsed += TIMING.heartbeat * 1.5
        lab["A"].engine.tick()
    lab.deliver("A", "C")
    lengths = []
    for _ in range(40):
        lab["C"].engine.tick()
        lab.deliver("C", "A", count=1)
        lab.clock.elapsed += TIMING.heartbeat * 1.5
        lab["A"].engine.tick()
        lab.deliver("A", "B")
        lab["B"].engine.tick()
        lab.deliver("B", "A")
        while lab.wire.queues[("A", "C")]:
            lab.deliver("A", "C", count=1)
            lengths.append(len(lab["C"].log()))
    assert lengths == sorted(lengths)
    assert lab["C"].log() == lab["A"].log()


# -- S2: an answer counts only in the term in which it was given


def test_stock_an_answer_of_an_old_term_commits_an_entry_that_a_minority_holds():
    stock = StockCluster("ABCDE")
    stock.elect("A", "BC")
    stock.clear()
    stock.pump("A", "B")
    stock.clear()
    for number in range(6):
        stock.propose("A", f"old{number}", [])
    stock.heartbeat("A")
    stock.heartbeat("A")
    stock.deliver("A", "B")
    late = [each for each in stock.queues[("B", "A")] if each["success"]]
    stock.clear()
    stock.elect("C", "DE")
    stock.pump("C", "D", rounds=4)
    stock.pump("C", "A")
    stock.clear()
    stock.pump("C", "E", rounds=4)
    stock.clear()
    stock.elect("A", "DE")
    stock.clear()
    outcomes: list[int] = []
    stock.propose("A", "new", outcomes)
    stock.heartbeat("A")
    stock.pump("A", "D")
    assert outcomes == []
    for message in late:
        stock.receive("B", "A", message)
    stock.heartbeat("A")
    entry = stock["A"].log()[-1]
    assert outcomes == [0]
    assert [name for name in "ABCDE" if entry in stock[name].log()] == ["A", "D"]


def test_an_answer_of_an_old_term_counts_for_nothing():
    lab = Lab("ABCDE")
    lab.elect("A")
    lab.run(0.1)
    lab.cut("C", "D", "E")
    lab["A"].propose(*[f"old{number}" for number in range(6)])
    lab.deliver("A", "B")
    lab["B"].engine.tick()
    late = [each for each in lab.wire.queues[("B", "A")] if each.get("success")]
    assert late
    lab.mend()
    lab.cut("A", "B")
    lab.clock.elapsed += 2
    lab.elect("C", "DE")
    lab.mend()
    lab.cut("B")
    lab.run(0.3)
    assert not lab["A"].leads
    lab.cut("C")
    lab.clock.elapsed += 2
    lab.elect("A", "DE")
    lab.cut("E")
    before = len(lab["A"].outcomes)
    lab["A"].propose("new")
    lab.exchange("A", "D")
    for message in late:
        lab["A"].engine.receive("B", message)
    lab["A"].engine.tick()
    assert len(lab["A"].outcomes) == before
    assert lab["A"].engine.counts["stale_answer"] >= len(late)


# -- S3: a commit index that the log does not reach


class _ForgetfulJournal(MemoryJournal):  # type: ignore[misc] # pysyncobj carries no types
    def getRaftCommitIndex(self) -> int:  # noqa: N802
        return 50


def test_stock_a_commit_index_beyond_the_log_acknowledges_without_replication():
    stock = StockCluster("ABC", journal=_ForgetfulJournal)
    stock.elect("A", "B")
    stock.clear()
    outcomes: list[int] = []
    stock.propose("A", "x", outcomes)
    stock["A"].doTick(0)
    stock["A"].doTick(0)
    assert outcomes == [0]


def test_a_commit_index_beyond_the_log_refuses_to_start():
    disk = MemoryDisk()
    Journal(disk, on_fault=print)
    content = disk.read(journal_module.JOURNAL_FILE)
    assert content is not None
    disk.append(journal_module.JOURNAL_FILE, journal_module._encode(b"I", struct.pack("<Q", 50), durable=len(content)))
    disk.append(
        journal_module.JOURNAL_FILE,
        journal_module._encode(b"E", struct.pack("<QQ", 1, 0) + b"\x01", durable=len(content)),
    )
    with pytest.raises(Corrupt, match="entry 50 is committed"):
        Journal(disk, on_fault=print)


# -- S4: one vote counts once


def test_stock_one_vote_delivered_twice_elects_a_leader_of_five():
    stock = StockCluster("ABCDE")
    stock.campaign("A")
    stock.deliver("A", "B")
    vote = stock.queues[("B", "A")].popleft()
    stock.receive("B", "A", vote)
    stock.receive("B", "A", vote)
    assert stock["A"]._isLeader()


def test_one_vote_delivered_twice_is_one_vote():
    lab = Lab("ABCDE")
    lab.cut("A")
    lab.clock.elapsed += 2
    candidate, vote = lab["B"].engine, None
    while vote is None:  # until B campaigns, with pre-votes of C, D and E, of whom only C gets to vote
        lab.clock.elapsed += 0.05
        candidate.tick()
        for name in "CDE":
            asked = [each for each in lab.wire.queues[("B", name)] if each["type"] != "request_vote" or name == "C"]
            lab.wire.queues[("B", name)].clear()
            for message in asked:
                lab[name].engine.receive("B", message)
                lab[name].engine.tick()
            for message in lab.wire.queues[(name, "B")]:
                if message["type"] == "response_vote":
                    vote = message
                else:
                    candidate.receive(name, message)
            lab.wire.queues[(name, "B")].clear()
    for _ in range(3):
        candidate.receive("C", vote)
        candidate.tick()
    assert not candidate.leadership().is_leader
    assert candidate.counts["vote_again"] == 2


# -- S5: a leader of an old term is told


def test_stock_a_leader_of_an_old_term_is_never_told():
    stock = StockCluster("ABC")
    stock.elect("A", "B")
    stock.clear()
    stock.campaign("C")
    stock.clear()
    stock.elect("C", "B")
    stock.clear()
    stock.heartbeat("A")
    stock.deliver("A", "B")
    stock.deliver("A", "C")
    assert stock["A"]._isLeader()
    assert not stock.queues[("B", "A")]
    assert not stock.queues[("C", "A")]


def test_a_leader_of_an_old_term_is_told_and_steps_down():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("A")
    lab.clock.elapsed += TIMING.timeout_max
    lab.elect("C", "B")
    lab.mend()
    assert lab["A"].engine._core.is_leader()
    lab["A"].engine._core.send_now()
    lab.deliver("A", "B")
    lab.deliver("B", "A")
    assert not lab["A"].engine._core.is_leader()
    assert lab["A"].term == lab["C"].term


# -- S6: one node that misses a timeout must not depose a healthy leader


def test_stock_a_follower_that_misses_one_timeout_deposes_the_leader():
    stock = StockCluster("ABC")
    stock.elect("A", "B")
    stock.pump("A", "B", rounds=3)
    stock.pump("A", "C", rounds=3)
    stock.campaign("C")
    stock.deliver("C", "A")
    assert not stock["A"]._isLeader()


def test_a_follower_that_misses_one_timeout_changes_nothing():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.3)
    term = lab["A"].term
    lab["C"].engine._timer.deadline = 0
    lab.settle()
    lab.run(0.3)
    assert lab["A"].leads
    assert {node.term for node in lab.nodes.values()} == {term}


def test_an_isolated_follower_comes_back_without_raising_the_term():
    lab = Lab("ABC")
    leader = lab.await_leader()
    term = leader.term
    other = next(name for name in lab.names if name != leader.name)
    lab.cut(other)
    lab.run(5, step=0.05)
    lab.mend()
    lab.run(1)
    assert lab.leaders() == [leader.name]
    assert lab[other].term == term


# -- S7: a chunk of a snapshot proves nothing about the log that it will replace


def test_stock_a_chunk_of_a_snapshot_commits_entries_that_no_majority_has():
    stock = StockCluster("ABC")
    stock.elect("A", "B")
    stock.clear()
    stock.propose("A", "never committed", [])
    stock.heartbeat("A")
    stock.clear()
    chunk = {"type": "append_entries", "term": 9, "commit_index": 100, "serialized": None}
    stock.receive("C", "A", chunk)
    stock["A"].doTick(0)
    assert stock["A"].applied == ["never committed"]


def test_a_chunk_of_a_snapshot_commits_nothing():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.2)
    lab.cut("A")
    lab["A"].propose("never committed")
    chunk = {"type": "append_entries", "term": 9, "commit_index": 100, "serialized": None}
    lab["A"].engine.receive("C", chunk)
    lab["A"].engine.tick()
    assert lab["A"].machine.state == ()


# -- ReadIndex


def test_a_barrier_is_proven_by_a_majority_and_shared_by_all_who_wait():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.1)
    answers: list[str | None] = []
    for _ in range(5):
        lab["A"].engine.barrier(answers.append)
    lab["A"].engine.tick()
    assert [each["type"] for each in lab.wire.queues[("A", "B")]].count("ri") == 1
    assert answers == []
    lab.deliver("A", "B")
    lab["B"].engine.tick()
    lab.deliver("B", "A")
    assert answers == [None] * 5


def test_a_leader_is_sure_of_its_state_for_a_while_after_a_round():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.5)
    assert lab["A"].engine.leadership().fresh_until < lab.clock.elapsed
    asked = lab.clock.elapsed
    lab["A"].engine.barrier(lambda _: None)
    lab["A"].engine.tick()
    lab.run(0.05)

    assert lab.clock.elapsed < lab["A"].engine.leadership().fresh_until <= asked + TIMING.timeout_min / 4
    lab["A"].engine.hand_over()
    assert lab["A"].engine.leadership().fresh_until < lab.clock.elapsed


@pytest.mark.parametrize("noticed", [False, True], ids=["silence", "links-are-reset"])
def test_who_stands_by_a_leader_elects_nobody_else_while_that_leader_is_sure(noticed: bool):
    lab = Lab("ABC")
    lab.elect("A")
    lab["A"].engine.barrier(lambda _: None)
    lab.run(0.02)
    sure_until = lab["A"].engine.leadership().fresh_until
    assert sure_until > lab.clock.elapsed
    lab.cut("A")
    for name in "BC":
        if noticed:
            lab[name].engine.link("A", up=False)
        lab[name].engine._timer.deadline = lab.clock.elapsed  # both want to lead, one after the other
        lab.run(0.01)
    while lab.clock.elapsed < sure_until:
        lab.run(0.01)
        assert not lab["B"].engine._core.is_leader()
        assert not lab["C"].engine._core.is_leader()
    lab.run(3.0)
    assert set(lab.leaders()) & {"B", "C"}


def test_a_leader_that_told_another_one_to_lead_is_not_sure_of_its_term_any_more():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.2)
    lab.wire.cut.add(("A", "B"))  # what A sends to B is late
    assert lab["A"].engine.hand_over("B")
    for _ in range(200):
        lab["A"].engine.barrier(lambda _: None)
        lab.run(0.01)
        if not lab["A"].leads:
            break
        assert lab["A"].engine.leadership().fresh_until < lab.clock.elapsed


def test_a_barrier_on_an_isolated_leader_is_never_proven():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("A")
    answers: list[str | None] = []
    lab["A"].engine.barrier(answers.append)
    lab.run(0.3)
    assert answers == []
    lab.run(3)
    assert len(answers) == 1
    assert answers[0]


def test_a_barrier_on_a_follower_is_refused():
    lab = Lab("ABC")
    lab.elect("A")
    answers: list[str | None] = []
    lab["B"].engine.barrier(answers.append)
    lab["B"].engine.tick()
    assert answers
    assert "does not lead" in str(answers[0])


def test_a_barrier_whose_question_got_lost_is_asked_again():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.1)
    answers: list[str | None] = []
    lab["A"].engine.barrier(answers.append)
    lab["A"].engine.tick()
    for name in "BC":
        lab.wire.queues[("A", name)].clear()
    lab.run(0.2)
    assert answers == [None]


# -- wiped nodes


def _with_wiped_node(lab: Lab, *, rejoin: bool) -> None:
    lab.elect("A")
    lab["A"].propose("x")
    lab.run(0.2)
    lab.crash("C")
    lab.start("C", rejoin=rejoin)


def test_a_wiped_node_stops_when_it_hears_that_it_was_a_member():
    lab = Lab("ABC")
    _with_wiped_node(lab, rejoin=False)
    with pytest.raises(Corrupt, match="-rejoin"):
        lab.settle()


def test_a_wiped_node_neither_votes_nor_helps_to_commit():
    lab = Lab("ABC")
    _with_wiped_node(lab, rejoin=True)
    lab.cut("B")
    lab["A"].propose("alone")
    for _ in range(4):
        lab.clock.elapsed += 0.05
        lab.settle()
    assert lab["C"].standing() is Standing.LEARNER
    assert lab["C"].log() == lab["A"].log()  # it learns
    assert len(lab["A"].outcomes) == 1  # and counts for nothing
    answers: list[str | None] = []
    lab["A"].engine.barrier(answers.append)
    lab.settle()
    assert answers == []
    lab.run(3)
    assert lab.leaders() == []  # A has lost its majority and C gives no vote


def test_a_wiped_node_is_promoted_once_it_has_caught_up_and_then_counts():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    committed(lab, "A", 30)
    lab["A"].compact()
    _with_wiped_node(lab, rejoin=True)
    lab.run(TIMING.timeout_max / 2)
    assert lab["C"].standing() is Standing.LEARNER
    lab.run(2)
    assert lab["C"].standing() is Standing.MEMBER
    lab.crash("B")
    lab["A"].propose("with C")
    lab.run(0.2)
    assert lab["A"].outcomes[-1] == Committed(32)


def test_a_node_wiped_twice_is_not_promoted_by_the_old_promotion():
    lab = Lab("ABC")
    _with_wiped_node(lab, rejoin=True)
    lab.run(2)
    assert lab["C"].standing() is Standing.MEMBER
    lab.crash("C")
    lab.start("C", rejoin=True)
    lab.run(TIMING.timeout_max / 2)
    assert lab["C"].machine.state == lab["A"].machine.state
    assert lab["C"].standing() is Standing.LEARNER
