"""What the bare engine does wrong, and the tests that hold on to its cure: each must exist under the name given here.

The numbers are those under which the defects of pysyncobj 0.3.17 were found and weighed.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CURES: dict[str, tuple[str, ...]] = {
    "D1 nothing is ever flushed": (
        "unit/raft_journal_test.py::test_synced_entries_term_vote_and_commit_survive_a_power_loss",
        "unit/raft_engine_test.py::test_a_commit_survives_the_power_loss_of_all_nodes",
        "fault/raft_kill_test.py::test_what_was_acknowledged_survives_the_killing_of_all_nodes_at_once",
    ),
    "D2 a snapshot newer than the log clears the log": (
        "unit/raft_journal_test.py::test_a_crash_before_the_log_was_shortened",
        "unit/raft_journal_test.py::test_a_crash_before_the_log_gave_way_to_an_installed_snapshot",
    ),
    "D3 the log is rewritten entry by entry": (
        "unit/raft_journal_test.py::test_a_crash_while_shortening_leaves_the_whole_log",
    ),
    "D4 a late message truncates what was acknowledged": (
        "unit/raft_guard_test.py::test_stock_a_repeated_message_erases_acknowledged_entries",
        "unit/raft_guard_test.py::test_a_repeated_message_erases_nothing_and_no_acknowledged_command_is_lost",
        "unit/raft_guard_test.py::test_a_follower_that_catches_up_never_loses_an_entry_again",
        "sim/truncation_test.py::test_clusters_that_say_so_never_diverge",
    ),
    "D5 answers carry no term": (
        "unit/raft_guard_test.py::test_stock_an_answer_of_an_old_term_commits_an_entry_that_a_minority_holds",
        "unit/raft_guard_test.py::test_an_answer_of_an_old_term_counts_for_nothing",
    ),
    "D6 whatever arrives is unpickled, from anybody": (
        "unit/raft_seam_test.py::test_nothing_is_ever_unpickled",
        "cluster/trust_test.py::test_a_running_agent_unpickles_nothing",
        "cluster/streams_test.py::test_a_dialler_without_a_certificate_is_closed",
        "cluster/streams_test.py::test_a_name_that_the_certificate_does_not_hold_is_refused",
    ),
    "D7 a command that raises is applied for ever": (
        "unit/raft_engine_test.py::test_a_defect_in_apply_stops_the_node_naming_the_entry",
        "cluster/raft_thread_test.py::test_a_failing_apply_ends_the_thread_and_says_why",
    ),
    "D8 a callback that raises applies its command twice": (
        "unit/raft_replicated_log_test.py::test_a_caller_who_gives_up_harms_nobody_else",
        "unit/raft_replicated_log_test.py::test_a_failing_selector_fails_its_own_waiters_only",
    ),
    "D9 a damaged snapshot is passed over": (
        "unit/raft_snapshot_file_test.py::test_no_flipped_bit_is_read",
        "unit/raft_compaction_test.py::test_a_damaged_snapshot_from_the_leader_replaces_nothing",
        "fault/disk_test.py::test_a_damaged_directory_is_refused_with_the_remedy",
    ),
    "D10 a log without a snapshot file loses everything at the first compaction": (
        "unit/raft_compaction_test.py::test_a_snapshot_shortens_the_log_and_a_restart_continues_from_it",
        "unit/raft_journal_test.py::test_a_snapshot_without_a_journal",
    ),
    "D11 a node that lost its disk votes and acknowledges": (
        "unit/raft_guard_test.py::test_a_wiped_node_neither_votes_nor_helps_to_commit",
        "unit/raft_membership_test.py::test_two_of_three_wiped_nodes_begin_nothing",
        "fault/wiped_node_test.py::test_a_wiped_node_counts_for_nothing_until_it_rejoins",
    ),
    "D12 a damaged vote is a second vote": (
        "unit/raft_journal_test.py::test_a_second_vote_in_one_term_is_impossible",
        "unit/raft_journal_test.py::test_no_flipped_bit_ever_yields_another_log",
    ),
    "D13 a commit index beyond the log acknowledges alone": (
        "unit/raft_guard_test.py::test_stock_a_commit_index_beyond_the_log_acknowledges_without_replication",
        "unit/raft_guard_test.py::test_a_commit_index_beyond_the_log_refuses_to_start",
    ),
    "D14 no checksums, torn tails are not recognised": (
        "unit/raft_journal_test.py::test_a_torn_tail_is_cut_before_anything_follows_it",
        "unit/raft_journal_test.py::test_a_zeroed_tail_that_holds_committed_entries_is_noticed",
        "fault/disk_test.py::test_a_torn_tail_is_cut_and_nothing_acknowledged_is_missing",
    ),
    "D15 a full disk kills the process in the middle of a write": (
        "fault/disk_test.py::test_a_full_disk_stops_the_leader_and_loses_nothing",
        "fault/disk_test.py::test_a_failing_flush_stops_the_leader_and_loses_nothing",
    ),
    "D16 an isolated leader believes in itself for half a minute": (
        "unit/raft_engine_test.py::test_an_isolated_leader_stops_believing_in_itself_within_the_longest_timeout",
    ),
    "D17 the listener dies of a want of descriptors": (
        "cluster/streams_test.py::test_the_listener_outlives_the_want_of_descriptors",
        "cluster/trust_test.py::test_floods_of_strangers_up_to_the_limit_of_descriptors_cost_nothing",
    ),
    "D18 no pre-vote, votes count twice, stale leaders are not told": (
        "unit/raft_guard_test.py::test_stock_a_follower_that_misses_one_timeout_deposes_the_leader",
        "unit/raft_guard_test.py::test_a_follower_that_misses_one_timeout_changes_nothing",
        "unit/raft_guard_test.py::test_stock_one_vote_delivered_twice_elects_a_leader_of_five",
        "unit/raft_guard_test.py::test_one_vote_delivered_twice_is_one_vote",
        "unit/raft_guard_test.py::test_a_leader_of_an_old_term_is_told_and_steps_down",
    ),
    "D19 proposals hang when their answer is lost": (
        "unit/raft_replicated_log_test.py::test_a_command_that_no_majority_confirms_in_time_is_unknown",
        "unit/raft_compaction_test.py::test_an_outcome_behind_an_installed_snapshot_is_unknown",
        "unit/forwarding_leader_test.py::test_a_silent_leader_is_given_up_when_another_is_elected",
    ),
    "D20 methods are numbered, and a later version applies another one": (
        "unit/raft_engine_test.py::test_a_command_that_cannot_be_read_stops_the_node",
        "unit/raft_engine_test.py::test_an_entry_of_an_unknown_kind_stops_the_node",
        "unit/state_codec_test.py::test_every_command_survives_its_bytes_and_every_member_has_a_place",
    ),
    "D21 snapshots are made in a fork": (
        "unit/raft_seam_test.py::test_the_engine_never_reaches_the_snapshots_of_the_package",
        "unit/raft_replicated_log_test.py::test_a_snapshot_is_written_in_slices_between_other_work",
    ),
    "D22 a server that restarts with its first list elects itself": (
        "unit/raft_membership_test.py::test_stock_lists_one_server_apart_elect_two_leaders_of_one_term",
        "unit/raft_membership_test.py::test_nodes_with_lists_one_server_apart_never_meet_and_elect_nobody",
    ),
    "D23 a repeated command has another effect": (
        "unit/state_apply_test.py::test_repeated_id_is_found_whatever_the_command",
        "unit/state_apply_test.py::test_a_clock_that_was_set_forward_makes_nobody_forget_the_latest_ids",
        "unit/forwarding_leader_test.py::test_a_change_whose_reply_was_lost_is_repeated_under_its_id",
    ),
    "D24 names are resolved in the tick, reconnects wait five seconds": (
        "cluster/streams_test.py::test_peers_may_be_dialled_by_host_name",
        "cluster/streams_test.py::test_a_host_name_that_does_not_resolve_is_tried_again",
        "cluster/streams_test.py::test_a_peer_that_restarts_at_another_address_is_found_again",
    ),
}


@cache
def names_in(file: Path) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {each.name for each in ast.walk(ast.parse(file.read_text())) if isinstance(each, functions)}


@pytest.mark.parametrize("defect", CURES)
def test_the_cure_of_a_defect_of_the_bare_engine_is_tested(defect: str) -> None:
    for cure in CURES[defect]:
        file, _, name = cure.partition("::")
        assert name.startswith("test_")
        assert name in names_in(ROOT / "tests" / file), f"{cure} is gone: what shows now that it is cured?"


def test_no_number_is_left_out() -> None:
    assert [defect.split()[0] for defect in CURES] == [f"D{number}" for number in range(1, 25)]
