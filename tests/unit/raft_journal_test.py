import errno
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caserver.errors import Corrupt
from caserver.raft.disk import MemoryDisk
from caserver.raft.journal import JOURNAL_FILE, Entry, Journal, JournalFailed

NO_OP = (b"\x01", 1, 0)


def entry(index: int, term: int = 1, text: str = "") -> Entry:
    return (b"\x00" + (text or f"{index}.{term}").encode(), index, term)


def opened(disk: MemoryDisk) -> Journal:
    def unexpected(error: OSError) -> None:
        raise AssertionError(error)

    return Journal(disk, on_fault=unexpected)


def filled(disk: MemoryDisk, *entries: Entry, committed: int = 1) -> Journal:
    journal = opened(disk)
    for each in (NO_OP, *entries):
        journal.add(*each)
    journal.setRaftCommitIndex(committed)
    journal.onOneSecondTimer()
    journal.sync()
    return journal


def damaged(disk: MemoryDisk, change: Callable[[bytearray], object]) -> MemoryDisk:
    content = bytearray(disk.read(JOURNAL_FILE) or b"")
    change(content)
    copy = MemoryDisk()
    copy.replace(JOURNAL_FILE, bytes(content))
    return copy


def message(journal: Journal, position: int, entries: Sequence[Entry]) -> list[Entry]:
    """What pysyncobj does with an append_entries; returns the log that it sees before the message ends."""
    journal.deleteEntriesFrom(position)
    for each in entries:
        journal.add(*each)
    seen = journal[:]
    journal.end_of_message()
    return seen


class TestReopening:
    def test_an_empty_directory_gets_a_journal_at_once(self) -> None:
        disk = MemoryDisk()
        first, second = opened(disk), opened(disk.after_power_loss())

        assert (first.fresh, second.fresh) == (True, False)
        assert (len(second), second.last) == (0, (0, 0))
        assert (second.getCurrentTerm(), second.getVotedForNodeId(), second.getRaftCommitIndex()) == (0, None, 1)

    def test_synced_entries_term_vote_and_commit_survive_a_power_loss(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2), entry(3), committed=2)
        journal.setCurrentTerm(4, "n2")
        journal = opened(disk.after_power_loss())

        assert journal[:] == [NO_OP, entry(2), entry(3)]
        assert (journal.getCurrentTerm(), journal.getVotedForNodeId(), journal.getRaftCommitIndex()) == (4, "n2", 2)
        assert journal.last == (3, 1)

    def test_what_was_not_synced_may_be_gone_and_is_never_half_there(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2))
        durable = len(disk.read(JOURNAL_FILE) or b"")
        for index in (3, 4):
            journal.add(*entry(index))
        pending = bytes(journal._pending)
        disk.append(JOURNAL_FILE, pending)
        survivors = {
            tuple(opened(disk.after_power_loss(surviving_bytes=count))[:]) for count in range(len(pending) + 1)
        }

        assert survivors == {
            (NO_OP, entry(2)),
            (NO_OP, entry(2), entry(3)),
            (NO_OP, entry(2), entry(3), entry(4)),
        }
        assert opened(disk.after_power_loss(surviving_bytes=5)).torn_bytes == 5
        assert len(disk.after_power_loss().read(JOURNAL_FILE) or b"") == durable

    def test_a_torn_tail_is_cut_before_anything_follows_it(self) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2))
        disk.append(JOURNAL_FILE, b"\x40\0\0\0half a record")
        journal = opened(disk)
        journal.add(*entry(3))
        journal.sync()

        assert opened(disk)[:] == [NO_OP, entry(2), entry(3)]

    def test_bytes_that_only_the_page_cache_held_are_made_durable_before_use(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2))
        journal.add(*entry(3))
        disk.append(JOURNAL_FILE, bytes(journal._pending))
        opened(disk)  # after kill -9: no power loss, no sync

        assert opened(disk.after_power_loss())[:] == [NO_OP, entry(2), entry(3)]


class TestDamage:
    def test_no_flipped_bit_ever_yields_another_log(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2), entry(3), committed=3)
        journal.setCurrentTerm(2, "n1")
        whole, size = journal[:], len(disk.read(JOURNAL_FILE) or b"")

        content = disk.read(JOURNAL_FILE) or b""
        unnoticed = 0
        for at in range(size):
            flipped = MemoryDisk()
            flipped.replace(JOURNAL_FILE, content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
            try:
                found = opened(flipped)
            except Corrupt:
                continue
            assert found[:] == whole
            unnoticed += 1
        # Only the last record can pass for a write that never ended: nothing after it says that it was durable.
        assert unnoticed < 60

    @pytest.mark.parametrize("size", [0, 7, 8, 20])
    def test_an_emptied_or_shortened_file_is_damage(self, size: int) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2), committed=2)

        with pytest.raises(Corrupt, match=r"cut short.*-rejoin"):
            opened(damaged(disk, lambda content: content.__delitem__(slice(size, None))))

    def test_a_zeroed_tail_that_holds_committed_entries_is_noticed(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2), entry(3), committed=3)
        hinted = len(disk.read(JOURNAL_FILE) or b"")
        journal.setCurrentTerm(5, None)

        with pytest.raises(Corrupt, match="was durable and is damaged"):
            opened(damaged(disk, lambda content: content.__setitem__(slice(hinted - 60, hinted), bytes(60))))

    def test_a_commit_beyond_the_end_refuses(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2))
        journal.setRaftCommitIndex(9)
        journal.onOneSecondTimer()

        with pytest.raises(Corrupt, match="entry 9 is committed"):
            journal.sync()

    def test_a_rewritten_file_is_covered_to_its_last_entry(self) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2), entry(3)).deleteEntriesTo(1)
        content = disk.read(JOURNAL_FILE) or b""
        at = content.index(entry(3)[0])

        with pytest.raises(Corrupt, match="was durable"):
            opened(damaged(disk, lambda content: content.__setitem__(at, 0xFF)))

    def test_an_intact_record_of_nonsense_refuses(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2))
        journal._put(b"E", b"short")
        disk.append(JOURNAL_FILE, bytes(journal._pending))

        with pytest.raises(Corrupt, match="makes no sense"):
            opened(disk)


class TestLeadersMessages:
    def test_a_late_message_takes_nothing_away(self) -> None:
        journal = filled(MemoryDisk(), entry(2), entry(3), entry(4))
        seen = message(journal, 1, [entry(2)])

        assert seen == [NO_OP, entry(2)]
        assert journal[:] == [NO_OP, entry(2), entry(3), entry(4)]
        assert not journal.dirty

    def test_an_empty_message_shows_the_log_only_up_to_its_place(self) -> None:
        journal = filled(MemoryDisk(), entry(2), entry(3))
        journal.deleteEntriesFrom(1)

        assert (len(journal), journal[-1], journal[0:5], journal[:]) == (1, NO_OP, [NO_OP], [NO_OP])
        with pytest.raises(IndexError):
            journal[1]
        journal.end_of_message()
        assert journal[-1] == entry(3)

    def test_entries_are_replaced_from_the_first_that_differs(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, entry(2), entry(3), entry(4))
        message(journal, 1, [entry(2), entry(3, 2), entry(4, 2)])
        journal.sync()

        expected = [NO_OP, entry(2), entry(3, 2), entry(4, 2)]
        assert journal[:] == expected
        assert opened(disk.after_power_loss())[:] == expected

    def test_entries_beyond_the_end_are_added(self) -> None:
        journal = filled(MemoryDisk(), entry(2))

        assert message(journal, 1, [entry(2), entry(3), entry(4)]) == [NO_OP, entry(2), entry(3), entry(4)]

    def test_a_leader_that_contradicts_a_committed_entry_stops_the_node(self) -> None:
        journal = filled(MemoryDisk(), entry(2), entry(3), committed=3)

        with pytest.raises(Corrupt, match="committed here"):
            message(journal, 1, [entry(2, 2)])
        assert journal._contents.entries == [NO_OP, entry(2), entry(3)]

    def test_another_command_under_the_same_number_stops_the_node(self) -> None:
        journal = filled(MemoryDisk(), entry(2))

        with pytest.raises(Corrupt, match="not what this node's log holds"):
            message(journal, 1, [entry(2, text="other")])

    def test_an_entry_that_follows_nothing_is_refused(self) -> None:
        journal = filled(MemoryDisk(), entry(2))

        with pytest.raises(Corrupt, match="cannot follow"):
            journal.add(*entry(4))


class TestTermAndVote:
    def test_they_are_durable_on_return(self) -> None:
        disk = MemoryDisk()
        opened(disk).setCurrentTerm(3, "n1")

        assert opened(disk.after_power_loss()).getVotedForNodeId() == "n1"

    def test_a_second_vote_in_one_term_is_impossible(self) -> None:
        journal = opened(MemoryDisk())
        journal.setCurrentTerm(3, None)
        journal.setCurrentTerm(3, "n1")
        journal.setCurrentTerm(3, "n1")

        for term, vote in ((3, "n2"), (3, None), (2, "n1")):
            with pytest.raises(ValueError, match="must not replace"):
                journal.setCurrentTerm(term, vote)

    def test_a_vote_of_an_earlier_term_than_the_logs_does_not_count(self) -> None:
        journal = opened(MemoryDisk())
        journal.setCurrentTerm(3, "n1")
        journal.rewrite([entry(8, 5), entry(9, 5)])

        assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (3, None)


class TestDiskFaults:
    @pytest.mark.parametrize("operation", ["append", "datasync", "replace"])
    def test_a_fault_is_reported_once_and_ends_the_journal(self, operation: str) -> None:
        full = False

        def fail(attempted: str, name: str) -> None:
            if full and attempted == operation:
                raise OSError(errno.ENOSPC, "No space left on device")

        disk = MemoryDisk(before_change=fail)
        faults: list[OSError] = []
        journal = Journal(disk, on_fault=faults.append)
        journal.add(*NO_OP)
        journal.add(*entry(2))
        journal.sync()
        full = True
        journal.add(*entry(3))

        with pytest.raises(JournalFailed, match="No space left"):
            journal.rewrite(journal[:]) if operation == "replace" else journal.sync()
        for attempt in (journal.sync, lambda: journal.rewrite([]), lambda: journal.setCurrentTerm(9, "n1")):
            with pytest.raises(JournalFailed):
                attempt()
        journal._destroy()

        assert [fault.errno for fault in faults] == [errno.ENOSPC]
        full = False
        assert opened(disk.after_power_loss())[:] == [NO_OP, entry(2)]

    def test_many_entries_cost_one_write_and_one_flush(self) -> None:
        seen: list[str] = []
        journal = opened(MemoryDisk(before_change=lambda operation, _: seen.append(operation)))
        seen.clear()
        for index in range(1, 500):
            journal.add(*entry(index))
        journal.sync()
        journal.sync()

        assert seen == ["append", "datasync"]


class TestShortening:
    def test_entries_before_the_snapshot_go_and_all_else_stays(self) -> None:
        disk = MemoryDisk()
        journal = filled(disk, *(entry(index) for index in range(2, 9)), committed=7)
        journal.setCurrentTerm(2, "n3")
        journal.deleteEntriesTo(4)
        found = opened(disk.after_power_loss())

        assert found[:] == [entry(index) for index in range(5, 9)]
        assert (found.getCurrentTerm(), found.getVotedForNodeId(), found.getRaftCommitIndex()) == (2, "n3", 7)

    def test_a_crash_while_shortening_leaves_the_whole_log(self) -> None:
        class Crash(BaseException):
            pass

        def crash(operation: str, name: str) -> None:
            if armed and operation == "replace":
                raise Crash

        armed = False
        disk = MemoryDisk(before_change=crash)
        journal = filled(disk, entry(2), entry(3))
        armed = True
        with pytest.raises(Crash):
            journal.deleteEntriesTo(1)

        assert opened(disk.after_power_loss())[:] == [NO_OP, entry(2), entry(3)]

    def test_a_rewrite_never_drops_what_is_committed(self) -> None:
        journal = filled(MemoryDisk(), entry(2), entry(3), committed=3)

        with pytest.raises(Corrupt, match="is lost"):
            journal.rewrite([NO_OP, entry(2)])


class TestHealing:
    def healed(self, disk: MemoryDisk, snapshot: tuple[Entry, Entry] | None) -> list[Entry]:
        journal = opened(disk)
        journal.heal(snapshot)
        assert opened(disk.after_power_loss())[:] == journal[:]
        return journal[:]

    def test_a_whole_log_needs_no_snapshot(self) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2))

        assert self.healed(disk, None) == [NO_OP, entry(2)]

    def test_a_crash_before_the_log_was_shortened(self) -> None:
        disk = MemoryDisk()
        filled(disk, *(entry(index) for index in range(2, 6)), committed=4)

        assert self.healed(disk, (entry(2), entry(3))) == [entry(index) for index in range(2, 6)]

    def test_a_crash_before_the_log_gave_way_to_an_installed_snapshot(self) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2))

        assert self.healed(disk, (entry(8, 3), entry(9, 3))) == [entry(8, 3), entry(9, 3)]

    def test_uncommitted_entries_give_way_to_an_installed_snapshot(self) -> None:
        disk = MemoryDisk()
        filled(disk, *(entry(index) for index in range(2, 9)), committed=3)

        assert self.healed(disk, (entry(4), entry(5, 3))) == [entry(4), entry(5, 3)]

    def test_nothing_to_do_writes_nothing(self) -> None:
        disk = MemoryDisk()
        filled(disk, entry(2), entry(3)).deleteEntriesTo(1)
        seen: list[str] = []
        journal = opened(disk)
        disk._before_change = lambda operation, _: seen.append(operation)
        journal.heal((entry(2), entry(3)))

        assert not seen

    @pytest.mark.parametrize(
        ("entries", "committed", "snapshot", "text"),
        [
            ([entry(5), entry(6)], 1, None, "there is no snapshot"),
            ([entry(5), entry(6)], 1, (entry(2), entry(3)), "the snapshot ends at 3"),
            ([entry(2), entry(3)], 3, (entry(2), entry(3, 2)), "contradict each other"),
        ],
    )
    def test_files_that_cannot_belong_together(
        self, entries: list[Entry], committed: int, snapshot: tuple[Entry, Entry] | None, text: str
    ) -> None:
        disk = MemoryDisk()
        journal = opened(disk)
        journal.setRaftCommitIndex(committed)
        journal.rewrite(entries)

        with pytest.raises(Corrupt, match=text):
            opened(disk).heal(snapshot)

    def test_a_snapshot_without_a_journal(self) -> None:
        with pytest.raises(Corrupt, match="term and vote are lost"):
            opened(MemoryDisk()).heal((entry(2), entry(3)))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 3)),
        st.tuples(st.just("message"), st.integers(0, 8), st.integers(0, 4)),
        st.tuples(st.just("vote"), st.sampled_from(["n1", "n2"])),
        st.tuples(st.just("commit"), st.integers(1, 3)),
        st.tuples(st.just("shorten"), st.integers(0, 3)),
        st.tuples(st.just("sync")),
    ),
    max_size=25,
)
Facts = tuple[tuple[Entry, ...], int, str | None]


class Run:
    """A journal under random steps, and every state since the last one that was certainly durable."""

    def __init__(self) -> None:
        self.disk = MemoryDisk()
        self.journal = filled(self.disk)
        self.possible = [self.facts(self.journal)]

    @staticmethod
    def facts(journal: Journal) -> Facts:
        return tuple(journal[:]), journal._contents.term, journal._contents.vote

    def step(self, name: str, *given: int) -> None:
        getattr(self, name)(*given)
        self.possible.append(self.facts(self.journal))
        if not self.journal.dirty:
            del self.possible[:-1]

    def append(self, term: int) -> None:
        index, last_term = self.journal.last
        self.journal.add(*entry(index + 1, max(term, last_term)))
        self.possible.append(self.facts(self.journal))

    def add(self, term: int) -> None:
        self.append(term)

    def message(self, back: int, count: int) -> None:
        journal = self.journal
        position = max(journal.getRaftCommitIndex() - journal[0][1] + 1, len(journal) - back, 1)
        first, term = journal[0][1], journal[position - 1][2] + 1
        journal.deleteEntriesFrom(position)
        for offset in range(position, position + count):
            journal.add(*entry(first + offset, term))
            shown = journal._visible
            journal._visible = None
            self.possible.append(self.facts(journal))
            journal._visible = shown
        if count and position < len(journal._contents.entries):
            # between the cut and the first new entry
            cut = (tuple(journal._contents.entries[:position]), journal._contents.term, journal._contents.vote)
            self.possible.append(cut)
        journal.end_of_message()

    def vote(self, name: str) -> None:
        self.journal.setCurrentTerm(self.journal.getCurrentTerm() + 1, name)

    def commit(self, back: int) -> None:
        self.journal.setRaftCommitIndex(max(1, self.journal.last[0] - back))
        self.journal.onOneSecondTimer()

    def shorten(self, count: int) -> None:
        self.journal.deleteEntriesTo(min(count, len(self.journal) - 2) if len(self.journal) > 2 else 0)

    def sync(self) -> None:
        self.journal.sync()


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, torn=st.floats(0, 1))
def test_after_any_history_a_power_loss_leaves_a_state_that_was_never_taken_back(
    steps: list[tuple[str, int]], torn: float
) -> None:
    run = Run()
    for name, *values in steps:
        run.step(name, *values)
    pending = bytes(run.journal._pending)
    run.disk.append(JOURNAL_FILE, pending)
    found = opened(run.disk.after_power_loss(surviving_bytes=round(torn * len(pending))))

    assert run.facts(found) in run.possible
