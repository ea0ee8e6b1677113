from __future__ import annotations

import re

import pytest

from caserver.errors import Corrupt
from caserver.internode.keyring import Keyring
from caserver.raft import snapshot_file
from caserver.raft.journal import JOURNAL_FILE
from caserver.raft.ports import KeyReport, Seals
from caserver.raft.stored_keys import StoredKeys
from tests.testkit.raftlab import Lab, Node

OLD_SECRET, NEW_SECRET = b"o" * 32, b"n" * 32
CHANGING = Keyring([NEW_SECRET, OLD_SECRET])
NEW, OLD = CHANGING.key_ids
_SEAL = re.compile(r"sealed:(\w+)")


def in_command(command: bytes) -> frozenset[str]:
    return frozenset(_SEAL.findall(command.decode()))


def in_state(state: tuple[str, ...]) -> frozenset[str]:
    """The last sealed entry stands for all: a later one replaces what was sealed before."""
    found = [key for each in state for key in _SEAL.findall(each)]
    return frozenset(found[-1:])


def keys_of(node: Node, keyring: Keyring = CHANGING) -> StoredKeys[tuple[str, ...]]:
    node.engine._seals = in_state
    return StoredKeys(node.engine, node.journal, node.machine, keyring=keyring, seals=Seals(in_command, in_state))


def stored(keys: StoredKeys[tuple[str, ...]], node: Node) -> set[str]:
    keys.look()
    assert node.engine.keys is not None
    return set(node.engine.keys.stored)


def single() -> tuple[Lab, Node, StoredKeys[tuple[str, ...]]]:
    lab = Lab("A")
    lab.run(0.1)
    node = lab["A"]
    return lab, node, keys_of(node)


def commit(lab: Lab, node: Node, *commands: str) -> None:
    node.propose(*commands)
    lab.run(0.05)


def test_what_lies_in_journal_and_state_is_counted() -> None:
    lab, node, keys = single()
    assert stored(keys, node) == set()
    commit(lab, node, f"sealed:{OLD}", "other")
    assert stored(keys, node) == {OLD}
    commit(lab, node, f"sealed:{NEW}")
    assert stored(keys, node) == {OLD, NEW}


def test_the_log_is_compacted_once_the_state_is_sealed_anew_and_not_before() -> None:
    lab, node, keys = single()
    commit(lab, node, f"sealed:{OLD}")
    assert not keys.look()
    commit(lab, node, f"sealed:{NEW}")
    assert keys.look()
    node.engine.compact()
    node.compact()

    assert not keys.look()
    assert stored(keys, node) == {NEW}
    for name in (JOURNAL_FILE, snapshot_file.SNAPSHOT_FILE):
        assert f"sealed:{OLD}\x00".encode() not in (node.disk.read(name) or b"") + b"\x00", name


def test_the_entry_before_the_snapshot_keeps_its_place_and_nothing_else() -> None:
    lab, node, keys = single()
    commit(lab, node, f"sealed:{OLD}", f"sealed:{NEW}")
    node.engine.compact()
    node.compact()

    assert OLD.encode() not in (node.disk.read(JOURNAL_FILE) or b"")
    assert stored(keys, node) == {NEW}
    commit(lab, node, "after")
    again = lab.start("A", lab.crash("A"))
    lab.run(0.1)
    assert again.machine.state == (f"sealed:{OLD}", f"sealed:{NEW}", "after")


def test_a_snapshot_counts_until_a_later_one_replaces_it() -> None:
    lab, node, keys = single()
    commit(lab, node, f"sealed:{OLD}", "plain")
    node.engine.compact()
    node.compact()
    commit(lab, node, f"sealed:{NEW}")
    assert stored(keys, node) == {OLD, NEW}
    assert keys.look()
    node.engine.compact()
    node.compact()
    assert stored(keys, node) == {NEW}


def test_a_log_as_new_as_its_snapshot_is_not_compacted_again() -> None:
    lab, node, _ = single()
    commit(lab, node, "one")
    node.engine.compact()
    node.compact()
    node.engine.compact()
    assert node.engine.making is None
    commit(lab, node, "two")
    node.engine.compact()
    assert node.engine.making is not None


@pytest.mark.parametrize("where", ["journal", "snapshot"])
def test_a_node_without_the_key_of_what_it_stores_does_not_start(where: str) -> None:
    lab, node, _ = single()
    commit(lab, node, f"sealed:{OLD}")
    if where == "snapshot":
        node.engine.compact()
        node.compact()
    commit(lab, node, f"sealed:{NEW}")

    keys_of(node).require_held()
    with pytest.raises(Corrupt, match=rf"sealed with key {OLD}, .*\({NEW}\): list the former secret"):
        keys_of(node, Keyring([NEW_SECRET])).require_held()


def test_an_entry_that_is_not_committed_counts_too() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    node, keys = lab["A"], keys_of(lab["A"])
    lab.cut("B", "C")
    node.propose(f"sealed:{OLD}")
    node.engine.tick()

    assert stored(keys, node) == {OLD}
    assert node.machine.state == ()


def test_an_entry_that_another_leader_replaced_counts_no_more() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    node, keys = lab["A"], keys_of(lab["A"])
    lab.cut("A")
    node.propose("before", f"sealed:{OLD}")
    node.engine.tick()
    assert stored(keys, node) == {OLD}
    lab.run(3.0)
    (other,) = (lab[name] for name in "BC" if lab[name].leads)
    other.propose("one", f"sealed:{NEW}", "three")
    lab.mend()
    lab.run(2.0)

    assert node.machine.state == ("one", f"sealed:{NEW}", "three")
    assert stored(keys, node) == {NEW}


def test_looking_again_reads_only_what_is_new() -> None:
    lab, node, _ = single()
    read: list[bytes] = []

    def counting(command: bytes) -> frozenset[str]:
        read.append(command)
        return in_command(command)

    keys = StoredKeys(node.engine, node.journal, node.machine, keyring=CHANGING, seals=Seals(counting, in_state))
    commit(lab, node, *(f"k{number}" for number in range(50)))
    keys.look()
    keys.look()
    commit(lab, node, f"sealed:{OLD}")
    assert stored(keys, node) == {OLD}
    assert len(read) == 51


def test_every_node_hears_what_the_others_hold() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    for name in "AB":
        keys_of(lab[name]).look()
    lab.run(2.5)

    report = KeyReport((NEW, OLD), ())
    assert lab["C"].engine.leadership().keys == {"A": report, "B": report}
    assert lab["A"].engine.leadership().keys == {"A": report, "B": report}


def test_what_a_peer_said_is_forgotten_with_its_link() -> None:
    lab = Lab("ABC")
    lab.elect("A")
    keys_of(lab["B"]).look()
    lab.run(2.5)
    assert "B" in lab["A"].engine.leadership().keys
    lab.unlink("A", "B")
    assert "B" not in lab["A"].engine.leadership().keys
