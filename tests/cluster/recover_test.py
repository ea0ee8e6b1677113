"""The list of nodes changes while all are stopped, as README has it: grown, shrunk, and put up again by who survived."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from caserver.cli import main
from tests.testkit import openssl
from tests.testkit.cluster import ANSWERS_WITHIN, Cluster, Node, run_cli, wait_for
from tests.testkit.invariants import Witness, check_invariants

FIVE = ("n1", "n2", "n3", "n4", "n5")


def stop(cluster: Cluster) -> None:
    for node in cluster:
        if node.running:
            assert cluster.stop(node) == 0


def exported(node: Node, name: str = "") -> Path:
    """Export a stopped node."""
    file = node.directory / f"{name or node.name}.export"
    file.unlink(missing_ok=True)
    done = run_cli("operator", "recover", "export", f"-data-dir={node.data_dir}", f"-out={file}")
    assert done.returncode == 0, done.stderr
    assert file.stat().st_mode & 0o777 == 0o600
    return file


@dataclass(frozen=True, slots=True)
class Done:
    """What a command said."""

    returncode: int
    stderr: str


def imported(node: Node, files: Sequence[Path], *options: str) -> Done:
    """Import at a stopped node; in this process, because there are many."""
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        command = ["operator", "recover", "import", f"-config-file={node.config_file}", *options, *map(str, files)]
        code = main(command, {})
    return Done(code, said.getvalue())


def import_everywhere(cluster: Cluster, files: Sequence[Path], *options: str) -> None:
    for node in cluster:
        done = imported(node, files, *options)
        assert done.returncode == 0, done.stderr


def _ended(node: Node) -> bool | None:
    return None if node.running else True


def told(node: Node) -> tuple[Any, Any]:
    """What must survive: configuration and roots."""
    roots = node.get("/v1/connect/ca/roots").json()
    return node.get("/v1/connect/ca/configuration?consistent").json(), (roots["TrustDomain"], roots["Roots"])


def test_growing_from_one_to_three_to_five_and_back(tmp_path: Path) -> None:
    witness = Witness()
    with Cluster(tmp_path, ("n1",)).start_ready() as one:
        (node,) = one
        body = {"Provider": "consul", "Config": {"LeafCertTTL": "48h"}}
        assert node.put("/v1/connect/ca/configuration", body).status == 200
        witness.leaf(node, "before")
        before = told(node)
        stop(one)
        files = [exported(node)]
        secret = (node.data_dir / "cluster_secret").read_text().strip()

    for names in (FIVE[:3], FIVE, FIVE[2:]):
        with Cluster(tmp_path, names, secret=secret) as cluster:
            old = next(node for node in cluster if node.data_dir.exists())
            cluster.start(old)  # a new list in the configuration is not enough
            wait_for("the node to refuse", partial(_ended, old))
            assert "cluster with all nodes stopped by `caserver operator recover export` and `import`" in old.log
            import_everywhere(cluster, files)
            cluster.start_ready()
            assert all(told(each) == before for each in cluster)
            witness.leaf(cluster.followers()[0], f"among-{len(names)}")
            check_invariants(cluster, witness)
            cluster.kill(cluster.leader())
            witness.leaf(cluster.answering[0], "without-its-leader")
            stop(cluster)
            majority = cluster.nodes[: len(names) // 2 + 1]
            files = [exported(each) for each in majority]


def test_a_lost_majority_is_recovered_from_the_survivor_and_only_on_its_word(tmp_path: Path) -> None:
    witness = Witness()
    secret, patience = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=", {"raft_multiplier": 2, "rpc_hold_timeout": "2s"}
    with Cluster(tmp_path, secret=secret, settings={"performance": patience}) as cluster:
        cluster.start_ready()
        survivor, *lost = cluster.nodes
        own = openssl.make_root(tmp_path / "own", survivor.get("/v1/connect/ca/roots").json()["TrustDomain"])
        assert survivor.put("/v1/connect/ca/configuration", own.configuration()).status == 200
        witness.leaf(survivor, "before")
        before = told(survivor)
        stop(cluster)
        for node in lost:
            for file in node.data_dir.iterdir():
                file.unlink()

        for node in lost:
            node.extra.append("-rejoin")
        cluster.start()
        for node in cluster:
            wait_for(f"{node.name} to answer", partial(node.try_get, "/v1/status/live"))
        assert survivor.put("/v1/connect/ca/configuration", {"Provider": "consul"}, timeout=ANSWERS_WITHIN).status in (
            500,
            503,
        )
        assert [node.get("/v1/status/leader").json() for node in cluster] == [""] * 3  # and nobody founds another CA
        for node in cluster:
            cluster.kill(node)
            node.extra.clear()

        files = [exported(survivor)]
        refused = imported(survivor, files)
        assert refused.returncode == 1
        assert "1 of 3 nodes are exported, a majority of 2 is needed" in refused.stderr

        loud = imported(survivor, files, "-survivor")
        assert loud.returncode == 0, loud.stderr
        assert "WARNING: only 1 of the 3 old nodes are known" in loud.stderr
        import_everywhere(cluster, files, "-survivor")  # once more on the first: it has it, nothing changes
        cluster.start_ready()
        assert all(told(node) == before for node in cluster)
        check_invariants(cluster, witness)
        written = [file for node in cluster for file in node.data_dir.iterdir()] + files
        assert any(file.suffix == ".old" for file in written)
        for file in written:
            assert own.key.splitlines()[1].encode() not in file.read_bytes(), file
            assert file.stat().st_mode & 0o777 == 0o600, file

        again = cluster.followers()[0]
        cluster.kill(again)
        for file in again.data_dir.iterdir():
            file.unlink()
        assert imported(again, files, "-survivor").returncode == 0
        cluster.start(again)
        cluster.wait_for_log("holds what was imported and nothing later", again)
        wait_for("the node to end", partial(_ended, again))
        again.extra.append("-rejoin")
        cluster.start(again)
        cluster.wait_for_log("promoted", again)
        assert told(again) == before


def test_wrong_uses_change_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path).start_ready() as cluster:
        first, second, third = cluster

        running = run_cli("operator", "recover", "export", f"-data-dir={first.data_dir}")
        assert (running.returncode, "another caserver process uses the data directory" in running.stderr) == (1, True)
        cluster.kill(first)
        files = [exported(first)]
        busy = imported(second, files, "-survivor")
        assert (busy.returncode, "another caserver process uses the data directory" in busy.stderr) == (1, True)

        stop(cluster)
        files = [exported(each) for each in (second, third)]
        cluster.start(second, third)
        cluster.wait_ready(second, third)
        second.put("/v1/connect/ca/configuration", {"Provider": "consul", "Config": {"LeafCertTTL": "48h"}})
        stop(cluster)
        stale = imported(second, files)
        assert (stale.returncode, "has run since it was exported" in stale.stderr) == (1, True)

        fresh = [exported(each) for each in (second, third)]
        done = imported(second, fresh)
        assert done.returncode == 0, done.stderr
        cluster.start(first, second)
        cluster.wait_for_log("of generation 0", second)
        cluster.wait_for_log("missed a `caserver operator recover import`", first)
        assert all(node.running for node in (first, second))
        for node in (first, second):
            cluster.kill(node)

        for node in (first, third):
            assert imported(node, fresh).returncode == 0
        cluster.start_ready()
        shown = first.get("/v1/connect/ca/configuration").json()
        assert shown["Config"]["LeafCertTTL"] == "48h"
