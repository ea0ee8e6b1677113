"""Torture a real cluster under load and judge what its clients were told. Run it as scripts/torture.

Real processes, random faults one after another: kill -9 of one, two, all; SIGSTOP; failing and slow syncs; with --netns also
partitions and a full disk, in network and mount namespaces that this program makes for itself (root). Afterwards: the
history of the configuration must be linearizable, the shared invariants must hold, and every certificate that a client
ever received must be booked in the state of every node. Exit code 0: all of it held.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cryptography import x509

from caserver.authority.issuance import BACKDATED, DROP_AFTER
from caserver.raft.disk import PosixDisk
from caserver.raft.recovery import Export, choose, export
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState, LedgerRow
from tests.testkit import netns
from tests.testkit.cluster import Cluster, Node, NotInTime
from tests.testkit.history import Kind, Operation, Verdict, check
from tests.testkit.invariants import Witness, check_invariants, verifies
from tests.testkit.torture_faults import PLAIN, WITH_NAMESPACES, Fault, Scene, disk_orders
from tests.testkit.torture_load import CONFIGURATION, FIRST_TTL, Received, TortureLoad

ENDED = 143  # exit code: told to stop before the end
CANNOT = 77  # exit code: namespaces cannot be made here
SMALL_MIB = 48  # of the data directory that a full disk is tried on
ROUNDING = 1.0  # seconds; NotBefore has whole ones
ROTATIONS = 6


@dataclass(slots=True)
class Outcome:
    """What is printed and decides the exit code."""

    faults: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def main() -> int:
    """Parse, prepare the namespaces, torture, print."""
    arguments = parse()
    if arguments.netns:
        if (why := netns.unavailable()) is not None:
            print(f"torture: {why}")
            return CANNOT
        netns.reexecute()
    catalogue = {**PLAIN, **(WITH_NAMESPACES if arguments.netns else {})}
    if unknown := set(arguments.only) - set(catalogue):
        print(f"torture: no such fault: {', '.join(sorted(unknown))}; known: {', '.join(catalogue)}")
        return 2
    chosen = {name: fault for name, fault in catalogue.items() if not arguments.only or name in arguments.only}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # the directory is removed then, too
    with stage(arguments) as scene:
        outcome = torture(scene, chosen, minutes=arguments.minutes, faults_max=arguments.faults)
        judge(scene, outcome)
        report(scene, outcome, seed=arguments.seed, delay=arguments.late)
        if outcome.broken and arguments.keep_logs:
            Path(arguments.keep_logs).write_text("\n".join(f"---- {node.name}\n{node.log}" for node in scene.cluster))
    return 1 if outcome.broken else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--nodes", type=int, choices=(3, 5), default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long faults are made (default 5)")
    parser.add_argument("--faults", type=int, default=1_000_000, help="stop after so many faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))  # noqa: S311
    parser.add_argument("--netns", action="store_true", help="with partitions and a full disk; needs root")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="only these faults: a,b,c")
    parser.add_argument("--multiplier", type=int, default=1, help="raft_multiplier of the nodes (default 1)")
    parser.add_argument(
        "--pause", type=float, default=0.1, help="mean seconds between calls of one client (default 0.1)"
    )
    parser.add_argument(
        "--late", type=float, default=0.0, help="seconds that this machine may delay an answer on its way (default 0)"
    )
    parser.add_argument("--keep-logs", default="", help="write the nodes' logs to this file if something broke")
    return parser.parse_args()


@contextmanager
def stage(arguments: argparse.Namespace) -> Iterator[Scene]:
    """A running cluster under load, in a temporary directory; all of it is gone at the end."""
    count = arguments.nodes
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="caserver-torture-")))
        networks = stack.enter_context(netns.Networks(count)) if arguments.netns else None
        cluster = Cluster(
            directory,
            [f"n{number}" for number in range(1, count + 1)],
            addresses=[networks.address(number) for number in networks.numbers] if networks else (),
            settings={
                "performance": {"raft_multiplier": arguments.multiplier},
                "http_config": {"allow_insecure_http": True},
            },
            connect={"ca_config": {"csr_max_per_second": 0, "leaf_cert_ttl": f"{FIRST_TTL}s"}},
        )
        small = prepare(cluster, networks, stack)
        stack.enter_context(cluster)
        cluster.start_ready()
        roots = cluster.nodes[0].get("/v1/connect/ca/roots").json()
        load = TortureLoad(
            cluster.nodes,
            Witness(),
            trust_domain=roots["TrustDomain"],
            seed=arguments.seed,
            rotations=ROTATIONS,
            pause=arguments.pause,
        )
        stack.enter_context(load)
        yield Scene(cluster, load, random.Random(arguments.seed), networks, small)  # noqa: S311


def prepare(cluster: Cluster, networks: netns.Networks | None, stack: ExitStack) -> list[Node]:
    """Put every node in its namespace and one data directory on a small file system; those are returned."""
    for node in cluster:
        node.module = ["tests.testkit.bad_disk", str(disk_orders(node))]
    if networks is None:
        return []
    for number, node in enumerate(cluster, start=1):
        node.prefix = networks.prefix(number)
    victim = cluster.nodes[-1]
    netns.mount_small(victim.data_dir, mebibytes=SMALL_MIB)
    stack.callback(netns.unmount_small, victim.data_dir)
    return [victim]


def torture(scene: Scene, faults: Mapping[str, Fault], *, minutes: float, faults_max: int) -> Outcome:
    """Make one fault after the other; stops early when the cluster does not recover from one."""
    outcome = Outcome()
    end = time.monotonic() + 60 * minutes
    deck: list[str] = []
    while time.monotonic() < end and outcome.faults.total() < faults_max:
        if not deck:  # each once before one comes again
            deck = list(faults)
            scene.chance.shuffle(deck)
        name = deck.pop()
        began = time.monotonic()
        try:
            faults[name](scene)
            outcome.faults[name] += 1
        except NotInTime as exc:
            outcome.broken.append(f"after {name}: {str(exc)[:600]}")
            return outcome
        print(f"{name:<18}{time.monotonic() - began:6.1f} s", flush=True)
        scene.hold(0.1, 0.5)
    return outcome


def judge(scene: Scene, outcome: Outcome) -> None:
    """Hold what clients were told against the cluster and, once it is stopped, against every node's state."""
    records, cluster = scene.load.records, scene.cluster
    scene.load.end()
    outcome.broken += records.broken
    try:
        cluster.wait_ready()
        for node in cluster:
            final_read(node, records.history)
        check_invariants(cluster, scene.load.witness)
    except AssertionError as exc:
        outcome.broken.append(str(exc)[:600])
    judge_history("consistent reads", check(records.history, initial=f"{FIRST_TTL}s"), outcome)
    every_read = [*records.history, *records.default_reads]
    judge_history("default reads", check(every_read, initial=f"{FIRST_TTL}s"), outcome)
    roots = {root["RootCert"] for root in cluster.nodes[0].get("/v1/connect/ca/roots?stale").json()["Roots"]}
    unverified = sum(1 for each in records.received if not verifies(each.leaf["CertPEM"], roots))
    if unverified:
        outcome.broken.append(f"{unverified} certificates do not verify under the roots that are served")
    for node in cluster:
        if node.running and (code := cluster.stop(node)) != 0:
            outcome.broken.append(f"{node.name} ended with {code} on SIGTERM")
    judge_ledgers(cluster, records.received, outcome)


def final_read(node: Node, history: list[Operation]) -> None:
    """What every node says at the end belongs to the history."""
    invoked = time.monotonic()
    value = node.get(f"{CONFIGURATION}?consistent").json()["Config"]["LeafCertTTL"]
    history.append(Operation(Kind.READ, invoked, time.monotonic(), value=value, who=f"{node.name} at the end"))


def judge_history(what: str, verdict: Verdict, outcome: Outcome) -> None:
    """No order of the operations explains the answers: that is a break. Nor is a search without an end a proof."""
    if not verdict.linearizable:
        outcome.broken.append(f"{what}: the history is not linearizable: {verdict.reason[:1200]}")


def judge_ledgers(cluster: Cluster, received: Sequence[Received], outcome: Outcome) -> None:
    """Every certificate is booked on every node, as it is, and came within its time."""
    machines = {node.name: CAStateMachine() for node in cluster}
    exports: list[Export] = []
    for node in cluster:
        disk = PosixDisk(node.data_dir)
        try:
            exports.append(export(disk, machines[node.name]))
        finally:
            disk.close()
    choose(exports, survivor=False)  # raises if equal logs hold different states
    for name, machine in machines.items():
        rows = booked(machine.state)
        missing = [each for each in received if not is_booked(each, rows)]
        if missing:
            outcome.broken.append(
                f"{len(missing)} of {len(received)} certificates are not in the ledger of {name}, e.g. {missing[0].leaf['SerialNumber']}"
            )


def booked(state: CAState) -> dict[int, LedgerRow]:
    """The ledger's rows by serial."""
    return {
        row.serial: row for hour in state.ledger.hours.values() for row in hour.rows.values() if row.serial is not None
    }


def is_booked(received: Received, rows: Mapping[int, LedgerRow]) -> bool:
    """Whether there is an entry for exactly this certificate, committed at the index that the client was told."""
    row = rows.get(serial_of(received))
    return row is not None and (row.service, row.index) == (received.leaf["Service"], received.leaf["CreateIndex"])


def serial_of(received: Received) -> int:
    """The serial that the certificate itself carries."""
    return leaf_of(received).serial_number


def leaf_of(received: Received) -> x509.Certificate:
    """The first certificate of the chain."""
    return x509.load_pem_x509_certificate(received.leaf["CertPEM"].encode())


def lateness(received: Received) -> float:
    """Seconds from the proposal (its time is NotBefore, backdated) to the client; an upper bound of that to the signature."""
    return received.received - (leaf_of(received).not_valid_before_utc.timestamp() + BACKDATED)


def report(scene: Scene, outcome: Outcome, *, seed: int, delay: float) -> None:
    """The table."""
    records = scene.load.records
    acknowledged = Counter(each.kind for each in records.history if each.returned != float("inf"))
    unknown = sum(1 for each in records.history if each.changes and each.returned == float("inf"))
    serials = Counter(serial_of(each) for each in records.received)
    if repeated := [serial for serial, count in serials.items() if count > 1]:
        outcome.broken.append(f"{len(repeated)} serials were given twice")
    late = sorted((lateness(each) for each in records.received), reverse=True)
    beyond = [each for each in records.received if lateness(each) > DROP_AFTER + ROUNDING + delay]
    if inexcusable := [each for each in beyond if not each.relayed_in_trouble]:
        outcome.broken.append(f"{len(inexcusable)} certificates came later than {DROP_AFTER:g} s after their proposal")
    unexcused = Counter(f"{each.what}: {each.why}" for each in records.troubles if not each.excused)
    lines = [
        ("seed", str(seed)),
        ("faults", f"{outcome.faults.total()} ({', '.join(f'{k} {v}' for k, v in sorted(outcome.faults.items()))})"),
        ("whole-cluster kills", str(outcome.faults["kill-all"])),
        ("calls", ", ".join(f"{what} {count}" for what, count in sorted(records.calls.items()))),
        (
            "acknowledged writes",
            f"{acknowledged[Kind.WRITE] + acknowledged[Kind.CAS]} (and {unknown} of unknown outcome)",
        ),
        ("consistent reads", f"{acknowledged[Kind.READ]}, refused compare-and-sets {acknowledged[Kind.REFUSED]}"),
        (
            "certificates received",
            f"{len(records.received)}, latest {late[0] if late else 0:.1f} s after its proposal, {len(beyond)} beyond {DROP_AFTER:g} s (kept back by a node that was paused or cut off)",
        ),
        ("default reads", str(len(records.default_reads))),
        ("write after kill -9", again(scene)),
        ("lost", "something, see below" if outcome.broken else "nothing"),
        ("errors seen, excused", str(sum(1 for each in records.troubles if each.excused))),
        ("errors seen, not excused", f"{unexcused.total()}"),
        ("invariant breaks", str(len(outcome.broken))),
    ]
    print()
    for name, value in lines:
        print(f"{name:<26}{value}")
    for text, count in unexcused.most_common(8):
        print(f"  {count:>6} x {text.splitlines()[0] if text else ''}")
    for text in outcome.broken:
        print(f"BROKEN: {text}")


def again(scene: Scene) -> str:
    """Time to write again after kill -9 of the leader."""
    times = scene.write_again
    if not times:
        return "not measured"
    refused = f", {scene.refused_writes} refused" if scene.refused_writes else ""
    return f"median {statistics.median(times):.2f} s, worst {max(times):.2f} s of {len(times)}{refused}"


if __name__ == "__main__":
    sys.exit(main())
