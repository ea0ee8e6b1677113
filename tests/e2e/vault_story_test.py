"""The documented Vault story in one command: OpenBao, three processes, a rotation there, every leaf judged by openssl."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERIFIED = (
    "openssl verify: OK: old leaf, old root",
    "openssl verify: OK: new leaf, new root",
    "openssl verify: OK: new leaf, old root (through the cross-signed root)",
)
ROOTS = ("connect-root: 1 issuer(s), 1 key(s)", "connect-root-2: 1 issuer(s), 1 key(s)")


def test_the_vault_story_on_a_laptop() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "devcluster.py"), "vault", "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for line in (*VERIFIED, *ROOTS, "stopped every node"):
        assert f"==> {line}" in done.stdout.splitlines()
    assert 'CA rotated to new root under provider "vault"' in done.stdout
