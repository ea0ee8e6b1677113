"""Start a cluster on loopback, show that it works, keep it running until Ctrl-C. Run it as scripts/devcluster.

``vault`` plays the Vault story: OpenBao, a cluster whose CA keys live there, a rotation to another root of its.

With --once it stops by itself after the verified leaf. The data lies in a temporary directory, or in --keep DIR, from
which the same cluster starts again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import devcluster_vault as vault
from tests.testkit.cluster import Cluster, Node, NotInTime

NODES_MAX = 9
PORTS = [port + 1000 * number for number in range(NODES_MAX) for port in (8500, 8300, 8303)]


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/devcluster", description="Start a caserver cluster on loopback.")
    parser.add_argument("story", nargs="?", choices=["vault"], help="vault: CA keys in OpenBao, and a rotation there")
    parser.add_argument("--once", action="store_true", help="stop after a leaf was fetched and verified")
    parser.add_argument("--nodes", type=int, default=3, metavar="N", help=f"how many, 1 to {NODES_MAX} (default 3)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep configuration, data and logs here")
    options = parser.parse_args(arguments)
    if options.story and options.keep:
        parser.error("OpenBao keeps nothing here, so --keep has no use with vault")
    if not 1 <= options.nodes <= NODES_MAX:
        parser.error(f"--nodes is 1 to {NODES_MAX}")
    return options


@contextmanager
def directory_for(keep: Path | None) -> Iterator[Path]:
    """The kept directory, or a temporary one."""
    if keep is not None:
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="caserver-dev-") as temporary:
        yield Path(temporary)


def start(cluster: Cluster) -> None:
    """Start every node and wait until all of them serve."""
    for node in cluster:
        say(f"starting {node.name}: {node.url}  (raft {node.server_port}, forward {node.forward_port})")
        cluster.start(node)
    for node in cluster:
        began = time.monotonic()
        cluster.wait_ready(node)
        say(f"{node.name} serves (after {time.monotonic() - began:.1f} s)")
    say(f"{cluster.leader().name} leads")


def verify_a_leaf(cluster: Cluster, directory: Path) -> None:
    """Fetch a leaf from a follower and let openssl judge it against the roots that are served."""
    node = next(iter(cluster.followers()), cluster.nodes[0])
    say(f"fetching a leaf for service web from {node.name}")
    leaf = node.get("/v1/agent/connect/ca/leaf/web").json()
    roots, chain = directory / "roots.pem", directory / "web.pem"
    roots.write_bytes(node.get("/v1/connect/ca/roots?pem=true").body)
    chain.write_text(leaf["CertPEM"])
    say(f"{leaf['ServiceURI']}, valid until {leaf['ValidBefore']}")
    openssl = shutil.which("openssl") or "openssl"
    command = [openssl, "verify", "-CAfile", str(roots), "-untrusted", str(chain), str(chain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"openssl verify refuses the leaf: {done.stdout}{done.stderr}")
    say(f"openssl verify: {done.stdout.strip().rpartition(': ')[2]}")


def invite(cluster: Cluster, directory: Path) -> None:
    """What to try next."""
    first: Node = cluster.nodes[0]
    last: Node = cluster.nodes[-1]
    print(
        f"""
Try (any node answers):

  curl -s '{first.url}/v1/connect/ca/roots?pretty'
  curl -s '{last.url}/v1/agent/connect/ca/leaf/web?pretty'
  curl -s '{first.url}/v1/connect/ca/configuration?pretty'
  curl -s '{last.url}/v1/status/leader'
  curl -s '{first.url}/v1/operator/raft/configuration?pretty'

  .venv/bin/caserver connect ca get-config -http-addr={first.url}
  .venv/bin/caserver operator raft list-peers -http-addr={last.url}

Rotate to a new generated root and look again:

  curl -s -X PUT -d '{{"Provider":"consul","Config":{{"PrivateKeyType":"ec","PrivateKeyBits":384}}}}' {last.url}/v1/connect/ca/configuration
  curl -s '{first.url}/v1/connect/ca/roots?pretty'

Configuration, data and logs: {directory}
Process ids: {", ".join(f"{node.name} {node.process.pid}" for node in cluster if node.process is not None)} (kill -9 one and ask again)
""",
        flush=True,
    )


def remain(cluster: Cluster) -> None:
    """Until Ctrl-C; says when a node ends."""
    say("running; Ctrl-C stops everything")
    ended: set[str] = set()
    while True:
        time.sleep(0.5)
        for node in cluster:
            if not node.running and node.name not in ended:
                ended.add(node.name)
                say(f"{node.name} ended; its log is {node.log_file}")


def remembered(directory: Path, count: int) -> tuple[list[int], str | None]:
    """Ports and cluster secret of the cluster that was kept here, or the usual ports and no secret."""
    configs = [directory / f"n{number + 1}.json" for number in range(count)]
    if not all(config.exists() for config in configs):
        return PORTS, None
    read = [json.loads(config.read_text()) for config in configs]
    return [config["ports"][name] for config in read for name in ("http", "server", "forward")], read[0].get(
        "cluster_secret"
    )


def play(options: argparse.Namespace, directory: Path, stack: ExitStack) -> None:
    """Build, start, prove, wait."""
    ports, secret = remembered(directory, options.nodes)
    names = [f"n{number + 1}" for number in range(options.nodes)]
    server = stack.enter_context(vault.server(directory, say)) if options.story else None
    token = "" if server is None else vault.restricted_token(server, say)
    say(f"writing the configuration of {len(names)} node(s) and a cluster_secret to {directory}")
    cluster = Cluster(
        directory,
        names,
        preferred_ports=ports,
        secret=secret,
        settings={"log_level": "INFO"},
        connect=None if server is None else vault.connect(server, token),
    )
    stack.callback(cluster.close)
    try:
        start(cluster)
        verify_a_leaf(cluster, directory)
        if server is not None:
            vault.rotate(cluster, directory, server, token, say)
        if not options.once:
            invite(cluster, directory)
            print("" if server is None else vault.invitation(server, directory), flush=True)
            remain(cluster)
    except (NotInTime, AssertionError, OSError):
        print(cluster.logs(), file=sys.stderr)
        raise


def main() -> int:
    """Play the story in a directory, and end every process however it goes."""
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with directory_for(options.keep) as directory, ExitStack() as stack:
        try:
            play(options, directory, stack)
        except KeyboardInterrupt:
            say("stopping")
        except (NotInTime, AssertionError, OSError) as exc:
            print(f"==> failed: {exc}", file=sys.stderr)
            return 1
    say("stopped every node")
    return 0


if __name__ == "__main__":
    sys.exit(main())
