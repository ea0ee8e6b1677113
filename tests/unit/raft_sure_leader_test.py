"""A leader that a majority vouched for answers reads by itself for a moment: nobody else is elected in it, whatever comes late."""

from __future__ import annotations

from collections.abc import Iterable

from tests.testkit.raftlab import TIMING, Lab


def silenced(names: str) -> Lab:
    """A cluster whose leader A was not heard for so long that the others would elect another one."""
    lab = Lab(names)
    lab.elect("A")
    lab.run(0.3)
    lab.cut("A")
    lab.clock.elapsed += TIMING.timeout_min + 0.01
    return lab


def ask(lab: Lab, candidate: str, others: Iterable[str]) -> None:
    """Let a node ask around whether it may campaign; ``others`` answer, and it has not heard them yet."""
    lab[candidate].engine._timer.deadline = lab.clock.elapsed
    lab[candidate].engine.tick()
    for other in others:
        lab.deliver(candidate, other)
        lab[other].engine.tick()


def vouch(lab: Lab, others: Iterable[str]) -> None:
    """Let A prove that ``others`` stand by it."""
    lab.mend()
    lab["A"].engine.barrier(lambda _: None)
    lab["A"].engine.tick()
    for other in others:
        lab.deliver("A", other)


def is_sure(lab: Lab) -> bool:
    return lab["A"].engine.leadership().fresh_until > lab.clock.elapsed


def test_who_vouches_does_not_campaign_on_what_it_was_promised_before():
    lab = silenced("ABC")
    ask(lab, "B", "C")
    lab.deliver("C", "B")  # B may campaign at its next tick, and hears its leader first
    vouch(lab, "B")
    lab["B"].engine.tick()
    lab.deliver("B", "A")
    lab.exchange("B", "C")
    assert is_sure(lab)
    assert not lab["B"].engine._core.is_leader()


def test_who_vouches_gives_no_vote_in_a_term_that_it_learnt_of_since():
    lab = silenced("ABCDE")
    ask(lab, "D", "BE")
    for other in "BE":
        lab.deliver(other, "D")
    lab["D"].engine.tick()  # it campaigns; what it sends to B is late
    lab.deliver("D", "E")
    lab["E"].engine.tick()
    lab.deliver("E", "D")
    vouch(lab, "BC")
    for other in "BC":
        lab.deliver(other, "A")
    ask(lab, "B", "E")
    lab.deliver("E", "B")
    assert lab["B"].term == lab["D"].term > lab["A"].term
    lab.exchange("D", "B")
    assert is_sure(lab)
    assert not lab["D"].engine._core.is_leader()


def test_who_starts_again_stands_by_the_leader_that_it_may_have_vouched_for():
    lab = silenced("ABC")
    vouch(lab, "B")
    lab.deliver("B", "A")
    lab.start("B", lab.crash("B"))
    lab.exchange("B", "C", rounds=2)
    ask(lab, "C", "B")
    lab.exchange("B", "C")
    assert is_sure(lab)
    assert not lab["C"].engine._core.is_leader()
    lab.cut("A")
    lab.run(2.0)
    assert set(lab.leaders()) & {"B", "C"}
