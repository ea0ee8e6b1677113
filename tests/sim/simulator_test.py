"""The simulator over a few dozen seeds, each twice, and against bugs that were planted for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.planted import DEFECTS, ENDS, PLANTED
from tests.sim.world import Report, simulate

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60  # in the default tiers; scripts/sim runs longer ones
SEEDS = range(1, 25)
SEEDS_PER_BUG = (
    150  # mostly the first few do, some take fifteen; any change of the product makes other runs of the same seeds
)


def nodes_for(seed: int) -> int:
    return 5 if seed % 3 == 0 else 3


@pytest.mark.parametrize("seed", SEEDS)
def test_no_fault_breaks_an_invariant_and_every_run_repeats_itself(seed: int):
    first, second = (simulate(seed, steps=STEPS, nodes=nodes_for(seed)) for _ in range(2))

    assert first.violation is None, f"{first.verdict}; repeat with {first.command}"
    assert (first.trace, first.lines) == (second.trace, second.lines)
    assert first.counts["leaves received"] > 0


def test_restores_break_no_invariant():
    restores = 0
    for seed in range(1, 5):
        report = simulate(seed, steps=STEPS, nodes=nodes_for(seed), restores=True)
        assert report.violation is None, f"{report.verdict}; repeat with {report.command}"
        restores += report.counts.get("restore answered", 0)  # a run need not come to one

    assert restores > 0


def find(bug: str) -> Report | None:
    for seed in range(1, SEEDS_PER_BUG + 1):
        report = simulate(seed, steps=STEPS, nodes=5 if seed % 2 else 3, parts=PLANTED[bug])
        if report.violation:
            return report
    return None


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str):
    report = find(bug)

    assert report is not None, f"{SEEDS_PER_BUG} seeds did not find {bug}"


def test_a_failing_seed_fails_alike_every_time():
    parts = PLANTED["a leader that signs before the commit"]
    first, second = (simulate(1, nodes=5, parts=parts) for _ in range(2))

    assert first.violation
    assert (first.violation, first.step, first.trace) == (second.violation, second.step, second.trace)


@pytest.mark.parametrize("place", DEFECTS)
def test_an_exception_that_nobody_foresaw_fails_the_run_wherever_it_appears(place: str):
    first, second = (simulate(1, steps=20, parts=DEFECTS[place]) for _ in range(2))

    assert first.violation is not None
    assert "LookupError: planted" in first.violation
    assert 'planted.py", line' in first.traceback
    assert (first.violation, first.traceback, first.trace) == (second.violation, second.traceback, second.trace)


def test_a_part_of_the_agent_that_ends_by_itself_fails_the_run():
    report = simulate(1, steps=20, parts=ENDS)

    assert report.violation == "the part of n1 ended: by itself"


def test_the_script_repeats_what_a_test_saw(tmp_path: Path):
    trace = tmp_path / "trace"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONHASHSEED", None)
    shown = subprocess.run(
        [sys.executable, "scripts/sim.py", "--seed", "3", "--steps", "30", "--trace", str(trace)],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    report = simulate(3, steps=30, keep_trace=True)

    found = re.search(r"trace ([0-9a-f]+)", shown)
    assert found is not None
    assert report.trace.startswith(found[1])
    assert trace.read_text() == "".join(report.kept)
