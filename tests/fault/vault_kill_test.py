"""Leaders die in the middle of rotations at a Vault server: leaves go on, and nothing is left behind there."""

from __future__ import annotations

from pathlib import Path

from tests.testkit.cluster import Cluster
from tests.testkit.openbao import Server
from tests.testkit.vault_kills import kill_leaders


def test_sigkill_of_leaders_in_the_middle_of_rotations_at_vault(tmp_path: Path, openbao: Server) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        kill_leaders(cluster, openbao, kills=3, seed=1)
