"""Traps of membership, found by simulation: each springs on the bare engine and does not on ours."""

from __future__ import annotations

from itertools import combinations

import pytest

from caserver.errors import Corrupt
from caserver.internode.membership import Membership
from caserver.raft import snapshot_file
from caserver.raft.data_dir import DataDir
from caserver.raft.disk import MemoryDisk
from caserver.raft.guard import Standing
from caserver.raft.journal import replace_file
from caserver.raft.ports import Committed
from tests.testkit.raftlab import TIMING, Lab
from tests.testkit.stockraft import StockCluster

ONE_APART = {"A": "ABC", "C": "ABC", "B": "ABD", "D": "ABD"}  # C was replaced by D, on half of the nodes


# -- lists one server apart


def test_stock_lists_one_server_apart_elect_two_leaders_of_one_term() -> None:
    stock = StockCluster("ABCD", lists=ONE_APART)
    stock.elect("A", "C")
    stock.elect("B", "D")

    assert stock["A"]._SyncObj__raftCurrentTerm == stock["B"]._SyncObj__raftCurrentTerm


def test_nodes_with_lists_one_server_apart_never_meet_and_elect_nobody() -> None:
    lab = Lab("ABCD", founded=False, lists=ONE_APART)
    membership = {name: Membership(ONE_APART[name]) for name in "ABCD"}
    met = []
    for a, b in combinations("ABCD", 2):
        refusals = [
            membership[b].check(membership[a].hello(a, to=b)),
            membership[a].check(membership[b].hello(b, to=a)),
        ]
        assert [refusal is None for refusal in refusals] in ([True, True], [False, False])
        if refusals == [None, None]:
            lab.link(a, b)
            met.append(a + b)
    lab.run(5)

    assert met == ["AC", "BD"]
    assert lab.leaders() == []


def test_a_member_does_not_start_with_another_list_nor_on_a_copy_of_another_nodes_directory() -> None:
    disk = MemoryDisk()
    directory = DataDir.open(disk, node="B", names="ABC")
    directory.load(on_fault=lambda _: None)
    directory.mark_initialised()
    disk.close()

    with pytest.raises(Corrupt, match="operator recover export"):
        DataDir.open(disk, node="B", names="ABD")
    disk.close()
    with pytest.raises(Corrupt, match="belongs to node B, this is node D"):
        DataDir.open(disk, node="D", names="ABC")


# -- a wiped node and its former self


def test_stock_a_wiped_nodes_former_acknowledgement_commits_what_a_minority_holds() -> None:
    stock = StockCluster("ABCDE")
    stock.elect("A", "BCDE")
    stock.clear()
    outcomes: list[int] = []
    stock.propose("A", "x", outcomes)
    stock.pump("A", "B")
    stock.clear()
    stock.wipe("B")
    assert outcomes == []
    stock.pump("A", "C")
    entry = stock["A"].log()[-1]

    assert outcomes == [0]
    assert [name for name in "ABCDE" if entry in stock[name].log()] == ["A", "C"]


def test_a_wiped_nodes_former_acknowledgement_counts_for_nothing() -> None:
    lab = Lab("ABCDE")
    lab.elect("A")
    lab.run(0.2)
    lab.cut("C", "D", "E")
    lab["A"].propose("x")
    lab.exchange("A", "B")
    assert lab["B"].log() == lab["A"].log()
    lab.crash("B")
    lab.start("B", rejoin=True)
    lab.exchange("A", "B")
    lab.mend()
    lab.cut("D", "E")
    for _ in range(3):
        lab.clock.elapsed += TIMING.heartbeat * 1.2
        lab.exchange("A", "BC")
    assert lab["C"].log() == lab["A"].log()
    assert lab["B"].standing() is Standing.LEARNER
    assert lab["A"].outcomes == []

    lab.mend()
    lab.run(0.2)
    assert lab["A"].outcomes == [Committed(1)]


# -- a wiped majority


def test_stock_two_of_three_wiped_nodes_begin_a_second_history() -> None:
    stock = StockCluster("ABC")
    stock.elect("A", "BC")
    stock.clear()
    outcomes: list[int] = []
    stock.propose("A", "the first CA", outcomes)
    for name in "BC":
        stock.pump("A", name)
    stock.clear()
    for name in "BC":
        stock.wipe(name)
    stock.elect("B", "C")
    stock.propose("B", "a second CA", outcomes)
    stock.pump("B", "C")

    assert outcomes == [0, 0]
    assert stock["B"].applied == ["a second CA"]
    assert stock["A"].applied == ["the first CA"]


@pytest.mark.parametrize("rejoin", [False, True])
def test_two_of_three_wiped_nodes_begin_nothing(rejoin: bool) -> None:
    lab = Lab("ABC")
    lab.elect("A")
    lab["A"].propose("the first CA")
    lab.run(0.2)
    lab.cut("A")
    for name in "BC":
        lab.crash(name)
    for name in "BC":
        lab.start(name, rejoin=rejoin)
        lab.cut("A")
    lab.run(10)
    assert lab.leaders() == []

    if not rejoin:
        lab.link("A", "B")
        with pytest.raises(Corrupt, match="-rejoin"):
            lab.run(1)
        return
    for name in "BC":
        lab.link("A", name)
    lab.run(5)
    assert lab.leaders() == []  # one vote is left: only `recover import -survivor` goes on from here
    assert lab["A"].machine.state == ("the first CA",)


# -- a cluster that begins with an import


def imported() -> MemoryDisk:
    """What `recover import` leaves of a state that ended with entry 9 of term 2."""
    disk = MemoryDisk()
    previous, last = (b"\x00a", 8, 2), (b"\x00b", 9, 2)
    snapshot_file.write(disk, previous=previous, last=last, slices=[b"a\nb\n"])
    replace_file(disk, entries=[previous, last], term=5)
    return disk


def of_imported_nodes(*names: str) -> Lab:
    lab = Lab("ABC", founded=False, origin=9)
    lab.nodes.clear()
    for name in names:
        lab.start(name, imported())
    lab.run(2)
    return lab


def test_nodes_that_begin_with_an_import_elect_once_all_of_them_are_there() -> None:
    lab = of_imported_nodes("A", "B")
    assert lab.leaders() == []
    assert lab["A"].standing() is Standing.EMPTY

    lab.start("C", imported())
    leader = lab.await_leader()
    leader.propose("c")
    lab.run(0.2)
    assert {node.machine.state for node in lab.nodes.values()} == {("a", "b", "c")}
    assert leader.term > 5


def test_a_node_that_imports_again_after_the_others_went_on_does_not_count_until_it_caught_up() -> None:
    lab = of_imported_nodes("A", "B", "C")
    lab.await_leader()
    wiped = next(name for name in "ABC" if not lab[name].leads)
    lab.crash(wiped)
    lab.start(wiped, imported())
    with pytest.raises(Corrupt, match=r"holds what was imported and nothing later.*-rejoin"):
        lab.run(1)

    lab.crash(wiped)
    lab.start(wiped, imported(), rejoin=True)
    assert lab[wiped].standing() is Standing.LEARNER
    lab.run(3)
    assert lab[wiped].standing() is Standing.MEMBER
