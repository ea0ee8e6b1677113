"""The simulator with access control on: every request passes the gates while nodes die, split and come back."""

from __future__ import annotations

import pytest

from caserver.config.acl_settings import ACLSettings
from caserver.fields import Secret
from tests.sim.node import Parts
from tests.sim.world import simulate

MASTER = Secret("6c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57")
GUARDED = Parts(acl=ACLSettings(enabled=True, default_allow=False, initial_management=MASTER))
STRANGERS = Parts(acl=ACLSettings(enabled=True, default_allow=False))


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_break_no_invariant_and_keep_nobody_out_for_good(seed: int):
    report = simulate(seed, steps=60, nodes=5 if seed == 2 else 3, parts=GUARDED)

    assert report.violation is None, report.verdict
    assert report.counts["leaves received"] > 0


def test_whoever_shows_no_token_gets_nothing_whatever_fails():
    report = simulate(1, steps=40, nodes=3, parts=STRANGERS)

    assert report.counts.get("leaves received", 0) == 0
    assert report.violation == "n1 does not serve after everything healed: Permission denied"
