"""The documented Vault story for scripts/devcluster: OpenBao from its package, a cluster that signs through it, a rotation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.testkit import openbao, openssl
from tests.testkit.cluster import Cluster, Node, run_cli, wait_for

ROOT, NEXT_ROOT, INTERMEDIATE = "connect-root", "connect-root-2", "connect-intermediate"
ROTATED = 'CA rotated to new root under provider "vault"'
POLICY = Path(__file__).resolve().parent.parent / "deploy" / "vault" / "policy-managed.hcl"
Say = Callable[[str], None]


@contextmanager
def server(directory: Path, say: Say) -> Iterator[openbao.Server]:
    """OpenBao in memory: it ends, and forgets, with the script."""
    home = directory / "openbao"
    home.mkdir(exist_ok=True)
    with openbao.in_memory(home) as running:
        say(f"OpenBao serves: {running.address} (in memory, root token {running.token})")
        yield running


def restricted_token(running: openbao.Server, say: Say) -> str:
    """A token that may do what the documented policy says, for both roots, and nothing else."""
    text = POLICY.read_text().replace("INTER", INTERMEDIATE)
    policy = "\n".join(dict.fromkeys((text.replace("ROOT", ROOT) + text.replace("ROOT", NEXT_ROOT)).splitlines()))
    say(f"making a token with {POLICY.parent.name}/{POLICY.name} for {ROOT}, {NEXT_ROOT} and {INTERMEDIATE}")
    return running.restricted_token(policy, period="1h")


def connect(running: openbao.Server, token: str) -> Mapping[str, Any]:
    """The ``connect`` block of every node."""
    config = {"address": running.address, "token": token, "root_pki_path": ROOT, "intermediate_pki_path": INTERMEDIATE}
    return {"enabled": True, "ca_provider": "vault", "ca_config": config}


def rotate(cluster: Cluster, directory: Path, running: openbao.Server, token: str, say: Say) -> None:
    """The documented example: another root path, the same intermediate path; old leaf and new one are verified by openssl."""
    node = next(iter(cluster.followers()), cluster.nodes[0])
    (old_root,) = _roots(node)
    old_leaf = _leaf(node)
    file = directory / "rotate.json"
    config = {"Address": running.address, "Token": token, "RootPKIPath": NEXT_ROOT, "IntermediatePKIPath": INTERMEDIATE}
    file.touch(mode=0o600)
    file.write_text(json.dumps({"Provider": "vault", "Config": config}, indent=2))
    say(f"caserver connect ca set-config -config-file={file.name}: {ROOT} -> {NEXT_ROOT}, both with {INTERMEDIATE}")
    done = run_cli("connect", "ca", "set-config", f"-http-addr={node.url}", f"-config-file={file}")
    if done.returncode != 0:
        raise AssertionError(f"set-config: {done.stdout}{done.stderr}")
    say(f"{done.stdout.strip()} ({cluster.wait_for_log(ROTATED).name}: {ROTATED})")
    new_root = next(pem for pem in _roots(node) if pem != old_root)
    new_leaf = wait_for("a leaf under the new root", lambda: leaf if (leaf := _leaf(node)) != old_leaf else None)
    for name, leaf, roots in (
        ("old leaf, old root", old_leaf, (old_root,)),
        ("new leaf, new root", new_leaf, (new_root,)),
        ("new leaf, old root (through the cross-signed root)", new_leaf, (old_root,)),
    ):
        if not openssl.accepts(directory, leaf, *roots):
            raise AssertionError(f"openssl verify refuses: {name}")
        say(f"openssl verify: OK: {name}")
    _show(running, say)


def _show(running: openbao.Server, say: Say) -> None:
    """What lies in the engines."""
    for path in (ROOT, NEXT_ROOT, INTERMEDIATE):
        say(f"{path}: {len(running.issuers(path))} issuer(s), {len(running.keys_of(path))} key(s)")
    say("the former issuer is removed once the change has settled, within a minute or so")


def invitation(running: openbao.Server, directory: Path) -> str:
    """What to try with the server at hand."""
    bao = f"BAO_ADDR={running.address} BAO_TOKEN={running.token} {openbao.binary()}"
    return f"""
Look into OpenBao, or make its life hard:

  {bao} list {INTERMEDIATE}/issuers
  {bao} read {NEXT_ROOT}/issuer/default
  {bao} operator seal    (unseal with the key in {directory}/openbao/openbao.log)
"""


def _roots(node: Node) -> list[str]:
    return [root["RootCert"] for root in node.get("/v1/connect/ca/roots").json()["Roots"]]


def _leaf(node: Node) -> str:
    leaf = node.get("/v1/agent/connect/ca/leaf/web", headers={"Cache-Control": "max-age=0"}).json()
    return str(leaf["CertPEM"])
