"""Kills leaders in the middle of rotations at a Vault server, again and again: scripts/vault-kills [--kills N] [--seed N].

With --walk it kills nobody: every rotation between two kinds of CAs is made once under load instead.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.cluster.vault_load_test import rotate_under_load
from tests.contract.vault_rotation_test import every_pair, matrix
from tests.testkit.cluster import Cluster
from tests.testkit.openbao import Server, in_memory
from tests.testkit.vault import VaultLab
from tests.testkit.vault_kills import kill_leaders


def main() -> int:
    """Run the kills on three nodes and a server of their own; 1 if anything was lost or left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--walk", action="store_true", help="make every rotation once under load, and kill nobody")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vault-kills-") as directory:
        place = Path(directory)
        (place / "openbao").mkdir()
        if given.walk:
            with in_memory(place / "openbao") as server:
                return walk(server)
        with in_memory(place / "openbao") as server, Cluster(place / "cluster").start_ready() as cluster:
            try:
                kill_leaders(
                    cluster, server, kills=given.kills, seed=given.seed, tell=lambda line: print(line, flush=True)
                )
            except AssertionError as exc:
                print(f"{exc}\n{cluster.logs()}", file=sys.stderr)
                return 1
    print(f"{given.kills} leaders killed: nothing was lost, nothing is left behind")
    return 0


def walk(server: Server) -> int:
    """Every rotation between two kinds of CAs under load; an AssertionError tells what failed."""
    lab = VaultLab(server)
    try:
        mesh = asyncio.run(rotate_under_load(lab, every_pair(list(matrix(server)))))
    finally:
        lab.close()
    print(
        f"{mesh.requests} requests and {mesh.handshakes.total()} handshakes in {len(mesh.handshakes)} steps: none failed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
