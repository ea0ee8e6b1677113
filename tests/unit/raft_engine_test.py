"""Elections, founding, outcomes and limits of engines whose time and messages are moved by hand."""

from __future__ import annotations

import pytest

from caserver.errors import Corrupt
from caserver.raft.engine import COMMAND_BYTES_MAX, QUEUE_MAX, Proposal
from caserver.raft.guard import Standing
from caserver.raft.ports import Committed, NotCommitted
from tests.testkit.raftlab import TIMING, Lab, Register, corrupting

# -- elections and founding


def test_a_single_node_leads_at_its_first_tick():
    lab = Lab("A", founded=False)
    lab["A"].engine.tick()
    assert lab["A"].leads
    assert lab["A"].engine.standing is Standing.MEMBER


def test_a_new_cluster_elects_nobody_before_every_listed_node_has_reported_empty():
    lab = Lab("ABC", founded=False)
    lab.link("A", "B")
    lab.run(5, step=0.05)
    assert [node.engine.standing for node in lab.nodes.values()] == [Standing.EMPTY] * 3
    lab.link("A", "C")
    lab.link("B", "C")
    leader = lab.await_leader()
    leader.propose("x")
    lab.run(0.2)
    assert [node.engine.standing for node in lab.nodes.values()] == [Standing.MEMBER] * 3
    assert [node.machine.state for node in lab.nodes.values()] == [("x",)] * 3


def obstacles(lab: Lab) -> list[str | None]:
    return [node.engine.leadership().obstacle for node in lab.nodes.values()]


def test_a_new_cluster_with_a_node_that_shall_rejoin_says_so_on_every_node():
    lab = Lab("ABC", founded=False)
    lab.start("A", rejoin=True)
    lab.link("B", "C")
    lab.run(5, step=0.05)
    assert lab.leaders() == []
    learner, *others = obstacles(lab)
    assert learner == (
        "nothing to rejoin: no node of this cluster ever held an entry; "
        "remove -rejoin and empty the data directory of this node"
    )
    told = "not yet: A (learner: remove -rejoin there and empty its data directory)"
    assert set(others) == {f"a new cluster elects its first leader once every listed node takes part; {told}"}

    lab.crash("A")
    lab.start("A")
    lab.await_leader()
    lab.run(0.2)
    assert obstacles(lab) == [None] * 3


def test_a_learner_is_not_sent_away_while_some_node_may_have_what_it_lost():
    lab = Lab("ABC", founded=False)
    lab.start("A", rejoin=True)
    lab.unlink("A", "C")
    lab.run(5, step=0.05)
    learner, waiting, _ = obstacles(lab)
    assert learner is None
    assert waiting is not None
    assert waiting.endswith("not yet: A (learner), C (not heard from since this node started)")


def test_a_node_that_learns_from_members_is_told_of_no_obstacle():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.2)
    lab.crash("C")
    lab.start("C", rejoin=True)
    for _ in range(20):
        lab.run(0.05)
        assert obstacles(lab) == [None] * 3
    assert lab["C"].standing() is Standing.MEMBER


def test_a_founding_node_that_restarts_is_still_counted():
    lab = Lab("ABC", founded=False)
    lab.link_all()
    while {node.standing() for node in lab.nodes.values()} != {Standing.FOUNDING}:
        lab.settle(rounds=1)
    disk = lab.crash("C", power_loss=True)
    lab.start("C", disk)
    assert lab["C"].standing() is Standing.FOUNDING
    lab.run(2)
    assert len(lab.leaders()) == 1


def test_a_new_cluster_has_a_leader_as_soon_as_it_is_founded():
    lab = Lab("CAB", founded=False)
    lab.link_all()
    lab.settle()
    assert lab.leaders() == ["A"]


def test_an_isolated_leader_stops_believing_in_itself_within_the_longest_timeout():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("A")
    lab["A"].propose("lost?")
    lab.run(TIMING.timeout_max + 2 * TIMING.heartbeat)
    assert not lab["A"].engine._core.is_leader()
    assert lab["A"].outcomes == []  # nobody can know yet


def test_the_proposal_of_an_isolated_leader_is_known_not_committed_once_another_entry_took_its_place():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("A")
    lab["A"].propose("lost")
    lab.run(3)
    new = next(name for name in lab.leaders() if name != "A")
    lab[new].propose("kept")
    lab.run(0.1)
    lab.mend()
    lab.run(2)
    assert [type(each) for each in lab["A"].outcomes] == [NotCommitted]
    assert {node.machine.state for node in lab.nodes.values()} == {("kept",)}


def test_the_loss_of_the_link_to_the_leader_makes_an_election_quick():
    lab = Lab("ABC")
    leader = lab.await_leader()
    lab.run(0.3)
    lab.crash(leader.name)
    before = lab.clock.elapsed
    lab.await_leader()
    assert lab.clock.elapsed - before < TIMING.timeout_min


@pytest.mark.parametrize("names", ["ABC", "ABCDE"])
def test_nodes_that_lose_their_leader_at_the_same_moment_do_not_split_the_vote(names: str):
    lab = Lab(names)
    leader = lab.await_leader()
    lab.run(0.3)
    lab.crash(leader.name)
    assert lab.await_leader().engine.leadership().term == leader.engine.leadership().term + 1


def test_leadership_is_handed_over_at_once_and_no_proposal_is_taken_meanwhile():
    lab = Lab("ABC")
    lab.elect("A")
    lab.run(0.2)
    assert lab["A"].engine.hand_over("C")
    lab["A"].propose("late")
    assert isinstance(lab["A"].outcomes[0], NotCommitted)
    lab.settle()
    assert lab.leaders() == ["C"]
    lab["C"].propose("x")
    lab.settle()
    assert lab["C"].outcomes == [Committed(1)]


def test_leadership_is_not_handed_to_a_node_that_is_gone_unknown_or_this_one():
    lab = Lab("ABC")
    lab.elect("A")
    lab.crash("C")
    assert [lab["A"].engine.hand_over(each) for each in ("C", "Z", "A")] == [False] * 3
    lab["A"].propose("still taken")
    lab.settle()
    assert lab["A"].outcomes == [Committed(1)]


def test_the_term_never_has_two_leaders_over_many_elections_with_lossy_links():
    lab = Lab("ABC")
    leaders: dict[int, set[str]] = {}
    for number in range(40):
        lab.mend()
        lab.cut("ABC"[number % 3])
        for _ in range(10):
            lab.run(0.1, step=0.05)
            for name, node in lab.nodes.items():
                if node.engine._core.is_leader():
                    leaders.setdefault(node.term, set()).add(name)
    assert len(leaders) > 3
    assert all(len(each) == 1 for each in leaders.values())


def test_a_follower_with_a_long_contradicted_tail_is_put_right_in_a_few_questions():
    lab = Lab("ABC")
    lab.elect("A")
    lab.cut("A")
    for number in range(200):
        lab["A"].propose(f"lost{number}")
    lab.clock.elapsed += 2
    lab.elect("B", "C")
    lab["B"].propose("kept")
    lab.settle()
    lab.mend()
    lab["B"].engine._core.send_now()
    questions = 0
    while lab["A"].log() != lab["B"].log() and questions < 100:
        lab.exchange("B", "A", rounds=1)
        questions += 1
    assert questions < 10


def test_a_heartbeat_is_sent_at_the_very_instant_it_is_due():
    lab = Lab("ABC")
    lab.elect("A")
    lab.settle()
    due = lab["A"].engine.next_wakeup()
    lab.clock.elapsed = due
    lab["A"].engine.tick()
    assert lab["A"].engine.next_wakeup() > due


# -- outcomes and limits


def test_a_follower_refuses_a_proposal_at_once():
    lab = Lab("ABC")
    lab.elect("A")
    lab["B"].propose("x")
    assert isinstance(lab["B"].outcomes[0], NotCommitted)


def test_a_command_over_the_size_limit_is_refused_and_one_at_the_limit_is_not():
    lab = Lab("ABC")
    lab.elect("A")
    lab["A"].propose("x" * (COMMAND_BYTES_MAX + 1), "y" * COMMAND_BYTES_MAX)
    lab.settle()
    assert isinstance(lab["A"].outcomes[0], NotCommitted)
    assert lab["A"].outcomes[1] == Committed(1)


def test_the_queue_is_bounded():
    lab = Lab("A")
    lab["A"].engine.tick()
    outcomes: list[object] = []
    for _ in range(QUEUE_MAX + 1):
        lab["A"].engine.propose(Proposal(b"x", outcomes.append))
    assert [type(each) for each in outcomes] == [NotCommitted]
    lab["A"].engine.tick()
    assert len(outcomes) == QUEUE_MAX + 1


def test_a_withdrawn_proposal_is_never_appended():
    lab = Lab("A")
    lab["A"].engine.tick()
    proposal = Proposal(b"x", lab["A"].outcomes.append)
    lab["A"].engine.propose(proposal)
    proposal.withdrawn = True
    lab["A"].engine.tick()
    assert lab["A"].machine.state == ()


def test_many_proposals_share_one_flush():
    lab = Lab("A")
    lab["A"].engine.tick()
    flushes: list[str] = []
    lab["A"].disk._before_change = lambda operation, _: flushes.append(operation)
    lab["A"].propose(*[f"k{number}" for number in range(100)])
    assert len(lab["A"].outcomes) == 100
    assert flushes.count("datasync") == 1


def test_a_commit_survives_the_power_loss_of_all_nodes():
    lab = Lab("ABC")
    lab.elect("A")
    lab["A"].propose("x")
    for _ in range(3):
        lab["A"].engine.tick()
        lab.deliver("A", "B")
        lab["B"].engine.tick()
        lab.deliver("B", "A")
        lab["A"].engine.tick()
    assert lab["A"].outcomes == [Committed(1)]
    disks = {name: lab.crash(name, power_loss=True) for name in "ABC"}
    for name, disk in disks.items():
        lab.start(name, disk)
    lab.await_leader()
    lab.run(0.3)
    assert {node.machine.state for node in lab.nodes.values()} == {("x",)}


# -- applying


def test_a_command_that_cannot_be_read_stops_the_node():
    lab = Lab("A", machine=lambda: Register(fail=corrupting))
    lab["A"].engine.tick()
    with pytest.raises(Corrupt, match="cannot read this"):
        lab["A"].propose("poison")


def test_a_defect_in_apply_stops_the_node_naming_the_entry():
    def broken(command: str) -> None:
        raise KeyError(command)

    lab = Lab("A", machine=lambda: Register(fail=broken))
    lab["A"].engine.tick()
    with pytest.raises(Corrupt, match="applying entry 3 failed: KeyError"):
        lab["A"].propose("x")


@pytest.mark.parametrize("error", [MemoryError, RecursionError, OSError])
def test_what_the_machine_lacks_is_never_taken_for_a_result(error: type[Exception]):
    def broken(command: str) -> None:
        raise error

    lab = Lab("A", machine=lambda: Register(fail=broken))
    lab["A"].engine.tick()
    with pytest.raises(error):
        lab["A"].propose("x")


def test_an_entry_of_an_unknown_kind_stops_the_node():
    lab = Lab("A")
    lab["A"].engine.tick()
    lab["A"].engine._core.append(b"\x07x", None)
    with pytest.raises(Corrupt, match="kind"):
        lab["A"].engine.tick()


# -- clocks


def offsets(names: str, wrong: dict[str, float]) -> tuple[Lab, dict[str, float]]:
    lab = Lab(names)
    for name, seconds in wrong.items():
        lab.walls[name] = seconds
    lab.run(2.5)
    return lab, {name: round(node.engine.leadership().clock_offset) for name, node in lab.nodes.items()}


def test_a_clock_is_compared_with_the_middle_one_of_all():
    lab, found = offsets("ABC", {"A": -30 * 86400.0})
    assert round(lab["A"].engine.leadership().clock_outvoted) == -30 * 86400
    assert found == {"A": -30 * 86400, "B": 0, "C": 0}


def test_of_two_clocks_that_differ_each_is_in_doubt():
    _, found = offsets("AB", {"A": -30 * 86400.0})
    assert found == {"A": -30 * 86400, "B": 30 * 86400}


def test_between_two_middle_clocks_the_one_further_off_counts():
    lab, _ = offsets("ABC", {"A": 50.0})
    lab.unlink("A", "C")
    lab.unlink("B", "C")
    lab.run(2.5)
    assert round(lab["A"].engine.leadership().clock_offset) == 50
    assert round(lab["B"].engine.leadership().clock_offset) == -50
    assert lab["A"].engine.leadership().clock_outvoted == 0


def test_the_clock_of_a_peer_that_is_gone_does_not_count():
    lab, found = offsets("ABC", {"B": 100.0, "C": 100.0})
    assert found["A"] == -100
    lab.unlink("A", "B")
    lab.unlink("A", "C")
    assert lab["A"].engine.leadership().clock_offset == 0


def test_a_peer_that_is_back_counts_with_what_its_clock_says_now():
    lab, _ = offsets("AB", {"B": 100.0})
    lab.unlink("A", "B")
    lab.walls["B"] = 0.0
    lab.link("A", "B")
    assert lab["A"].engine.leadership().clock_offset == 0
    lab.run(2.5)
    assert lab["A"].engine.leadership().clock_offset == 0
    lab.walls["B"] = 60.0
    lab.run(2.5)
    assert round(lab["A"].engine.leadership().clock_offset) == -60


# -- answers that ask for a tick


def test_of_a_majority_that_answers_the_first_asks_for_a_tick_and_the_rest_for_none():
    lab = Lab("ABCDE")
    leader = lab.await_leader()
    lab.settle()
    leader.propose("x")
    followers = [name for name in lab.names if name != leader.name]
    due = []
    for name in followers:
        lab.deliver(leader.name, name)
        lab[name].engine.tick()
        answer = lab.wire.queues[(name, leader.name)].popleft()
        due.append(leader.engine.receive(name, answer))
        if due[-1]:
            leader.engine.tick()
    assert due == [False, True, False, False]
    assert leader.outcomes == [Committed(1)]


def test_a_follower_that_fell_behind_is_fed_on_its_answers():
    lab = Lab("ABC")
    leader = lab.await_leader()
    lab.settle()
    behind = next(name for name in lab.names if name != leader.name)
    lab.cut(behind)
    for number in range(3):
        leader.propose(f"x{number}")
        lab.run(0.01)
    lab.mend()
    lab.run(TIMING.heartbeat * 3)
    assert lab[behind].machine.state == ("x0", "x1", "x2")
