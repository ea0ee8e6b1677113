"""A short torture: partitions, kills and disks, judged like the long one. The long form is scripts/torture."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.testkit import netns
from tests.testkit.cluster import ROOT

FAULTS = ("isolate-leader", "mute-leader", "bridge", "deafen-follower", "kill-all", "full-disk", "failing-disk")
MULTIPLIER = 2  # as in the other tests of clusters: no election because a busy test machine is late
LATE = 10  # seconds that a starved client of ours may sit on an answer
CALM = 0.2  # seconds between the calls of one client: nodes share their processors with the rest of the test run


@pytest.mark.timeout(600)
def test_a_short_torture_breaks_nothing() -> None:
    if (why := netns.unavailable()) is not None:
        pytest.skip(why)
    options = ["--netns", "--minutes=5", f"--faults={len(FAULTS)}", "--seed=7", f"--only={','.join(FAULTS)}"]
    options += [f"--multiplier={MULTIPLIER}", f"--pause={CALM}", f"--late={LATE}"]

    done = subprocess.run(
        [sys.executable, "scripts/torture.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
