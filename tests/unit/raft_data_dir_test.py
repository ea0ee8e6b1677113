import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from caserver.errors import Corrupt
from caserver.internode.membership import Membership
from caserver.raft import snapshot_file
from caserver.raft.data_dir import MARKER_FILE, DataDir, Marker
from caserver.raft.disk import MemoryDisk
from caserver.raft.journal import JOURNAL_FILE

NAMES = ("n1", "n2", "n3")
CLUSTER, OTHER = "11111111-0000-4000-8000-000000000000", "22222222-0000-4000-8000-000000000000"
FILES = (MARKER_FILE, JOURNAL_FILE, snapshot_file.SNAPSHOT_FILE)
PREVIOUS, LAST = (b"\x00a", 8, 2), (b"\x00b", 9, 2)


def no_fault(error: OSError) -> None:
    raise AssertionError(error)


@contextmanager
def opened(
    disk: MemoryDisk, *, node: str = "n1", names: Collection[str] = NAMES, rejoin: bool = False
) -> Iterator[DataDir]:
    try:
        yield DataDir.open(disk, node=node, names=names, rejoin=rejoin)
    finally:
        disk.close()


def started(disk: MemoryDisk, **options: Any) -> DataDir:
    """Open and load, as a node does."""
    with opened(disk, **options) as directory:
        directory.load(on_fault=no_fault)
        return directory


def member(*, snapshot: bool = False, names: Collection[str] = NAMES) -> MemoryDisk:
    """The directory of a voter."""
    disk = MemoryDisk()
    with opened(disk, names=names) as directory:
        journal, _ = directory.load(on_fault=no_fault)
        directory.mark_initialised()
        directory.mark_cluster(CLUSTER)
        journal.setCurrentTerm(2, "n1")
        if snapshot:
            snapshot_file.write(disk, previous=PREVIOUS, last=LAST, slices=[b"state"])
            journal.rewrite([PREVIOUS, LAST])
    return disk


def stored(disk: MemoryDisk) -> Marker:
    return Marker.decode(disk.read(MARKER_FILE) or b"")


class TestOrdinaryStarts:
    def test_a_new_directory_is_marked_before_anything_else_is_written(self) -> None:
        disk = MemoryDisk()
        with opened(disk) as directory:
            assert (directory.initialised, directory.rejoining, directory.cluster_id) == (False, False, None)
            assert disk.read(JOURNAL_FILE) is None

        assert stored(disk.after_power_loss()) == Marker.of("n1", NAMES)

    def test_what_was_marked_survives_a_power_loss(self) -> None:
        directory = started(member().after_power_loss())

        assert (directory.initialised, directory.cluster_id) == (True, CLUSTER)
        assert directory.membership().cluster_id == CLUSTER
        assert directory.membership().generation == "0"

    def test_a_snapshot_is_loaded_and_the_log_agrees_with_it(self) -> None:
        with opened(member(snapshot=True)) as directory:
            journal, snapshot = directory.load(on_fault=no_fault)

        assert snapshot is not None
        assert (snapshot.state, journal[:]) == (b"state", [PREVIOUS, LAST])

    def test_an_unchanged_marker_is_not_written_again(self) -> None:
        disk = member()
        changes: list[str] = []
        disk._before_change = lambda _, name: changes.append(name)
        directory = started(disk)
        directory.mark_initialised()
        directory.mark_cluster(CLUSTER)

        assert MARKER_FILE not in changes

    def test_the_directory_is_held_while_it_is_open(self) -> None:
        disk = MemoryDisk()
        with opened(disk), pytest.raises(BlockingIOError):
            DataDir.open(disk, node="n1", names=NAMES)

    def test_a_node_that_never_voted_may_change_its_name_and_its_peers(self) -> None:
        disk = MemoryDisk()
        started(disk)
        started(disk, node="n9", names=("n8", "n9"))

        assert stored(disk) == Marker.of("n9", ("n9", "n8"))

    def test_a_crash_before_the_journal_was_made_is_an_ordinary_start(self) -> None:
        disk = MemoryDisk()
        with opened(disk):
            pass

        assert not started(disk).initialised


class TestRefusals:
    def refused(self, disk: MemoryDisk, text: str, **options: Any) -> None:
        before = {name: disk.read(name) for name in FILES}
        with pytest.raises(Corrupt, match=text):
            started(disk, **options)
        disk.close()

        assert {name: disk.read(name) for name in before} == before

    def test_the_directory_of_another_node(self) -> None:
        self.refused(member(), "belongs to node n1, this is node n2", node="n2")

    def test_another_list_of_nodes(self) -> None:
        self.refused(member(), "operator recover", names=("n1", "n2", "n3", "n4"))

    def test_neither_is_mended_by_rejoin(self) -> None:
        self.refused(member(), "belongs to node n1", node="n2", rejoin=True)
        self.refused(member(), "operator recover", names=("n1",), rejoin=True)

    def test_a_member_without_its_log(self) -> None:
        disk = member()
        disk.replace(JOURNAL_FILE, None)

        self.refused(disk, "raft.log is gone: .* -rejoin")

    def test_a_snapshot_without_its_log(self) -> None:
        disk = MemoryDisk()
        started(disk)
        snapshot_file.write(disk, previous=PREVIOUS, last=LAST, slices=[b"state"])
        disk.replace(JOURNAL_FILE, None)

        self.refused(disk, "term and vote are lost")

    @pytest.mark.parametrize("name", [JOURNAL_FILE, snapshot_file.SNAPSHOT_FILE])
    def test_files_without_a_marker(self, name: str) -> None:
        disk = MemoryDisk()
        disk.replace(name, b"whatever")

        self.refused(disk, "no node.json")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff",
            b"{",
            b"[]",
            b"{}",
            b'{"format": 1}',
            b'{"format": 1, "node": "n1", "names": 3}',
            b'{"format": 1, "node": "n1", "names": "d", "initialised": 1}',
            b'{"format": 1, "node": "n1", "names": "d", "generation": 0}',
            b'{"format": 1, "node": "n1", "names": "d", "cluster_id": []}',
            b'{"format": 1, "node": "n1", "names": "d", "unknown": 1}',
        ],
    )
    def test_a_damaged_marker(self, content: bytes) -> None:
        disk = member()
        disk.replace(MARKER_FILE, content)

        self.refused(disk, r"node.json cannot be read")

    def test_the_marker_of_a_later_release(self) -> None:
        disk = member()
        disk.replace(MARKER_FILE, b'{"format": 2}')

        self.refused(disk, "later release")
        self.refused(disk, "later release", rejoin=True)

    def test_a_snapshot_that_is_damaged(self) -> None:
        disk = member(snapshot=True)
        disk.replace(snapshot_file.SNAPSHOT_FILE, b"CASNAP01 damaged")

        self.refused(disk, "-rejoin")

    def test_the_state_of_another_cluster(self) -> None:
        directory = started(member())

        with pytest.raises(Corrupt, match=f"belongs to cluster {CLUSTER}"):
            directory.mark_cluster(OTHER)


class TestSingleNode:
    """Nobody can teach it what it lost: its only ways are a backup and, if that is what its operator wants, a new CA."""

    REMEDY = "restore data_dir from a backup; .*new CA.*, empty it and start without -rejoin"

    def refused(self, disk: MemoryDisk, **options: Any) -> str:
        before = {name: disk.read(name) for name in FILES}
        with pytest.raises(Corrupt, match=self.REMEDY) as caught:
            started(disk, names=("n1",), **options)
        disk.close()

        assert {name: disk.read(name) for name in FILES} == before
        return str(caught.value)

    @pytest.mark.parametrize("rejoin", [False, True])
    @pytest.mark.parametrize("lost", [(JOURNAL_FILE,), (MARKER_FILE,), (MARKER_FILE, JOURNAL_FILE)])
    def test_lost_files_are_never_started_over(self, lost: Collection[str], rejoin: bool) -> None:
        disk = member(snapshot=True, names=("n1",))
        for name in lost:
            disk.replace(name, None)

        said = self.refused(disk, rejoin=rejoin)
        assert "majority" not in said

    def test_a_new_directory_is_not_for_rejoining(self) -> None:
        assert "no other nodes to rejoin" in self.refused(MemoryDisk(), rejoin=True)

    def test_a_learner_whose_peers_are_gone_is_no_voter(self) -> None:
        disk = MemoryDisk()
        started(disk, rejoin=True)

        self.refused(disk)

    @pytest.mark.parametrize("rejoin", [False, True])
    @pytest.mark.parametrize("name", [JOURNAL_FILE, snapshot_file.SNAPSHOT_FILE])
    def test_damaged_files_are_told_the_same(self, name: str, rejoin: bool) -> None:
        disk = member(snapshot=True, names=("n1",))
        disk.replace(name, b"CA damaged")

        assert self.refused(disk, rejoin=rejoin).count("-rejoin") == 1

    def test_the_flag_on_a_complete_directory_does_no_harm(self) -> None:
        assert started(member(names=("n1",)), names=("n1",), rejoin=True).initialised


class TestRejoin:
    def test_a_wiped_directory_becomes_a_learner_that_does_not_know_its_generation(self) -> None:
        directory = started(MemoryDisk(), rejoin=True)

        assert (directory.rejoining, directory.initialised, directory.membership().generation) == (True, False, None)

    def test_a_node_that_was_refused_as_new_may_rejoin(self) -> None:
        disk = MemoryDisk()
        started(disk)

        assert started(disk, rejoin=True).rejoining

    def test_a_learner_stays_one_without_the_flag_until_it_is_promoted(self) -> None:
        disk = MemoryDisk()
        started(disk, rejoin=True)
        again = started(disk)
        assert again.rejoining

        again.mark_initialised()
        assert (started(disk).rejoining, started(disk).initialised) == (False, True)

    def test_the_generation_that_it_learns_is_kept(self) -> None:
        disk = MemoryDisk()
        membership = started(disk, rejoin=True).membership()
        membership.meet(Membership(NAMES, "1:abc").hello("n2", to="n1"))

        assert membership.generation == "1:abc"
        assert started(disk.after_power_loss()).membership().generation == "1:abc"

    def test_a_disk_that_takes_no_generation_is_told_as_what_it_is(self) -> None:
        class Full(MemoryDisk):
            full = False

            def replace(self, name: str, data: bytes | None) -> None:
                if self.full:
                    raise OSError(errno.ENOSPC, "no space left")
                super().replace(name, data)

        disk, told = Full(), list[OSError]()
        membership = started(disk, rejoin=True).membership(on_fault=told.append)
        disk.full = True
        with pytest.raises(OSError, match="no space left") as failed:
            membership.meet(Membership(NAMES, "1:abc").hello("n2", to="n1"))

        assert told == [failed.value]
        assert membership.generation is None

    def test_a_lost_log_is_started_over_and_what_is_left_is_kept_aside(self) -> None:
        disk = member(snapshot=True)
        snapshot = disk.read(snapshot_file.SNAPSHOT_FILE)
        disk.replace(JOURNAL_FILE, None)
        with capture_logs() as logs:
            directory = started(disk, rejoin=True)

        assert (directory.rejoining, directory.initialised) == (True, False)
        assert (directory.cluster_id, directory.membership().generation) == (CLUSTER, "0")
        assert disk.read("snapshot") is None
        assert disk.read("snapshot.old") == snapshot
        assert [entry["event"] for entry in logs] == ["rejoin_started_over"]

    def test_files_without_a_marker_are_started_over(self) -> None:
        disk = member()
        disk.replace(MARKER_FILE, None)
        log = disk.read(JOURNAL_FILE)
        directory = started(disk, rejoin=True)

        assert (directory.rejoining, directory.membership().generation) == (True, None)
        assert disk.read("raft.log.old") == log

    def test_a_learner_that_loses_its_log_starts_over_by_itself(self) -> None:
        disk = MemoryDisk()
        started(disk, rejoin=True)
        snapshot_file.write(disk, previous=PREVIOUS, last=LAST, slices=[b"state"])
        disk.replace(JOURNAL_FILE, None)

        assert started(disk).rejoining
        assert disk.read("snapshot") is None
        assert disk.read("snapshot.old") is None

    def test_an_intact_directory_is_left_alone(self) -> None:
        disk = member(snapshot=True)
        with capture_logs() as logs:
            directory = started(disk, rejoin=True)

        assert (directory.initialised, directory.rejoining) == (True, False)
        assert disk.read("snapshot.old") is None
        assert [entry["event"] for entry in logs] == ["rejoin_ignored"]

    @pytest.mark.parametrize("survived", range(4))
    def test_a_crash_while_starting_over_never_leaves_a_voter(self, survived: int) -> None:
        class Crash(BaseException):
            pass

        disk = member(snapshot=True)
        disk.replace(JOURNAL_FILE, None)
        changes = 0

        def crash(operation: str, name: str) -> None:
            nonlocal changes
            if changes == survived:
                raise Crash
            changes += 1

        disk._before_change = crash
        with pytest.raises(Crash):
            started(disk, rejoin=True)
        left = disk.after_power_loss()
        assert started(left, rejoin=True).rejoining
        assert not stored(left).initialised
