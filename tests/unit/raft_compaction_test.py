"""Snapshots: made beside the log, sent in chunks, installed whole or not at all."""

from __future__ import annotations

import pytest

from caserver.errors import Corrupt
from caserver.raft.journal import JOURNAL_FILE
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.raft.snapshot_file import SNAPSHOT_FILE
from tests.testkit.raftlab import Lab, Node, Register, committed


class Forgetful(Register):
    """Forgets its secret at the command to erase it."""

    def apply(self, command: bytes) -> int:
        count = super().apply(command)
        if command == b"erase":
            self.state = tuple("" if each == "secret" else each for each in self.state)
        return count


def test_a_snapshot_shortens_the_log_and_a_restart_continues_from_it():
    lab = Lab("A", snapshot_every=20)
    lab["A"].engine.tick()
    committed(lab, "A", 30)
    lab["A"].compact()
    assert lab["A"].log()[0][0] == 19
    before = lab["A"].machine.state
    disk = lab.crash("A", power_loss=True)
    lab.start("A", disk).engine.tick()
    assert lab["A"].machine.state == before
    lab["A"].propose("more")
    assert lab["A"].machine.state == (*before, "more")


def test_commands_are_taken_while_a_snapshot_is_being_made_and_are_not_in_it():
    lab = Lab("A", snapshot_every=20)
    lab["A"].engine.tick()
    committed(lab, "A", 18)
    making = lab["A"].engine.making
    assert making is not None
    lab["A"].propose("later")
    while making.advance():
        pass
    lab["A"].engine.store_snapshot(making)
    lab["A"].engine.snapshot_stored(making)
    assert b"later" not in b"".join(making.slices)
    disk = lab.crash("A")
    lab.start("A", disk).engine.tick()
    assert lab["A"].machine.state[-1] == "later"


def test_a_node_that_missed_the_compacted_part_gets_the_snapshot():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    disk = lab.crash("C")
    committed(lab, "A", 50)
    lab["A"].compact()
    lab["B"].compact()
    lab.start("C", disk)
    lab.run(1)
    assert lab["C"].machine.state == lab["A"].machine.state
    assert lab["C"].log()[0][0] == lab["A"].log()[0][0]
    lab["A"].propose("after")
    lab.run(0.2)
    assert lab["C"].machine.state[-1] == "after"
    state, disk = lab["C"].machine.state, lab.crash("C", power_loss=True)
    assert lab.start("C", disk).engine.applied_index >= 20
    lab.run(0.5)
    assert lab["C"].machine.state == state


def test_a_large_snapshot_arrives_in_chunks_while_the_leader_keeps_its_majority():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    disk = lab.crash("C")
    for number in range(30):
        lab["A"].propose(f"{number}" + "x" * 60_000)
        lab.settle()
    lab["A"].compact()
    lab.crash("B")
    lab.start("C", disk)
    lab.run(2)
    assert lab["A"].leads
    assert lab["C"].machine.state == lab["A"].machine.state


def test_a_damaged_snapshot_from_the_leader_replaces_nothing():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    disk = lab.crash("C")
    committed(lab, "A", 50)
    lab["A"].compact()
    lab["A"].disk._files["snapshot"][-2] ^= 1
    lab.start("C", disk)
    with pytest.raises(Corrupt):
        lab.run(1)
    assert disk.read("snapshot") is None


def test_a_follower_whose_state_differs_from_the_leaders_stops():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    committed(lab, "A", 16)
    lab["B"].machine.state = ("else", *lab["B"].machine.state[1:])
    committed(lab, "A", 10, prefix="m")
    for name in "BCA":
        lab[name].compact()
    with pytest.raises(Corrupt, match="differs from that of the leader A"):
        lab.run(2)


def test_an_outcome_behind_an_installed_snapshot_is_unknown():
    lab = Lab("ABC", snapshot_every=20)
    lab.elect("A")
    lab.run(0.1)
    lab.cut("A")
    lab["A"].propose("mine?")
    lab.run(3)
    new = next(name for name in lab.leaders() if name != "A")
    committed(lab, new, 40)
    lab[new].compact()
    lab.mend()
    lab.run(1)
    assert lab["A"].machine.state == lab[new].machine.state
    assert [type(each) for each in lab["A"].outcomes] in ([OutcomeUnknown], [NotCommitted])


def lagging(lab: Lab) -> None:
    """``C`` was away while the others shortened their logs, and is back; nobody is linked to it yet."""
    lab.elect("A")
    disk = lab.crash("C")
    committed(lab, "A", 60)
    lab["A"].compact()
    lab.start("C", disk)
    for other in "AB":
        lab.unlink(other, "C")


def test_a_snapshot_whose_answer_could_not_be_sent_is_sent_again():
    lab = Lab("ABC", snapshot_every=20)
    lagging(lab)
    lab["A"].engine.link("C", up=True)  # the way back is not there yet
    lab.run(0.2)
    lab["C"].engine.link("A", up=True)
    lab.run(3.0)
    assert lab["C"].machine.state == lab["A"].machine.state


def forgets(before: tuple[str, ...], after: tuple[str, ...]) -> bool:
    return after[-1:] == ("erase",)


def stored(node: Node) -> list[bytes]:
    return [node.disk.read(name) or b"" for name in (JOURNAL_FILE, SNAPSHOT_FILE)]


def secrets_on_disk(lab: Lab) -> dict[str, bool]:
    return {name: any(b"secret" in content for content in stored(node)) for name, node in lab.nodes.items()}


def test_what_the_state_forgets_leaves_every_disk_at_the_same_entry():
    lab = Lab("ABC", machine=Forgetful, erased=forgets)
    lab.elect("A")
    lab["A"].propose("secret")
    lab["A"].propose("other")
    lab.run(0.3)
    assert secrets_on_disk(lab) == dict.fromkeys("ABC", True)
    lab["A"].propose("erase", "later")
    lab.run(0.3)
    made = {name: node.engine.making for name, node in lab.nodes.items()}
    assert len({making.index for making in made.values() if making is not None}) == 1
    assert None not in made.values()
    for node in lab.nodes.values():
        node.compact()
    assert secrets_on_disk(lab) == dict.fromkeys("ABC", False)
    assert lab["B"].machine.state[-1] == "later"


def test_a_snapshot_from_before_that_is_being_made_gives_way():
    lab = Lab("A", snapshot_every=5, machine=Forgetful, erased=forgets)
    lab["A"].engine.tick()
    lab["A"].propose("secret", *"abcd")
    early = lab["A"].engine.making
    assert early is not None
    lab["A"].propose("erase")
    lab["A"].compact()
    assert lab["A"].engine.making is None
    assert secrets_on_disk(lab) == {"A": False}


def test_a_snapshot_from_before_that_is_being_written_is_followed_by_another():
    lab = Lab("A", snapshot_every=5, machine=Forgetful, erased=forgets)
    lab["A"].engine.tick()
    lab["A"].propose("secret", *"abcd")
    early = lab["A"].engine.making
    assert early is not None
    while early.advance():
        pass
    early.writing = True
    lab["A"].propose("erase")
    assert lab["A"].engine.making is early
    lab["A"].compact()
    assert secrets_on_disk(lab) == {"A": True}
    lab["A"].compact()
    assert secrets_on_disk(lab) == {"A": False}


def test_a_node_that_died_before_its_snapshot_was_stored_makes_it_at_the_next_start():
    lab = Lab("A", machine=Forgetful, erased=forgets)
    lab["A"].engine.tick()
    lab["A"].propose("secret")
    lab["A"].propose("erase")
    disk = lab.crash("A")
    lab.start("A", disk).engine.tick()
    lab["A"].compact()
    assert secrets_on_disk(lab) == {"A": False}
