"""Measure the replicated log alone: how long a durable commit takes, and how many there are a second with 64 under way.

Three processes on loopback with real disks and TLS; the leader proposes commands of a leaf's size, from the loop of its own
that a server would use, and each is acknowledged when a majority has flushed it. Beside it stands what a commit cannot do
without: one fdatasync, one round trip over mutual TLS 1.3 between two processes, and both together in three processes that
do nothing else (``bench_floor``), measured before and after, for the three share the disk and the processors. The processor time is that of
the three nodes for one commit, with the callers that run in the leader's process.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caserver.environment import SystemClock, SystemEntropy
from caserver.raft.ports import Committed, Leadership
from caserver.raft.streams import Address
from caserver.raft.thread import RaftSettings, RaftThread
from scripts.bench_floor import COMMAND, KEYRING, NAMES, ROUNDS, floor
from tests.testkit.cluster import LOOPBACK, agent_command, free_ports

IN_FLIGHT = 64
SETTLE = 1.0  # seconds between the election and the first measurement
FIGURES = "figures.json"  # what the leader leaves in the common directory


class Counter:
    """The least state machine: counts commands."""

    def __init__(self) -> None:
        self.state = 0

    def encode(self, command: bytes) -> bytes:
        """As it is."""
        return command

    def apply(self, command: bytes) -> int:
        """One more."""
        self.state += 1
        return self.state

    def dump(self) -> Iterator[bytes]:
        """The count."""
        yield str(self.state).encode()

    def load(self, snapshot: bytes) -> None:
        """The count again."""
        self.state = int(snapshot)


Log = RaftThread[bytes, int, int]


def leads(_: int, leadership: Leadership) -> bool:
    """Selector: whether this node leads."""
    return leadership.is_leader


def one_more(log: Log, latencies: list[float]) -> Callable[[float], asyncio.Future[None]]:
    """A caller that proposes one command after another until the given moment."""

    async def call(end: float) -> None:
        while (began := time.perf_counter()) < end:
            if not isinstance(await log.propose(COMMAND), Committed):
                raise SystemExit("bench: a command was not committed")
            latencies.append(time.perf_counter() - began)

    return lambda end: asyncio.ensure_future(call(end))


async def measure(log: Log, pids: Sequence[int], *, callers: int, seconds: float) -> dict[str, float]:
    """Commits a second and latencies (seconds) with so many callers."""
    latencies: list[float] = []
    worked, began = processor_seconds(pids), time.perf_counter()
    caller = one_more(log, latencies)
    await asyncio.gather(*(caller(began + seconds) for _ in range(callers)))
    took, worked = time.perf_counter() - began, processor_seconds(pids) - worked
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "callers": callers,
        "rate": len(latencies) / took,
        "p50": cuts[49],
        "p99": cuts[98],
        "cpu": worked / len(latencies),
    }


def written_pids(directory: str) -> list[int]:
    """The processes that run a node."""
    return [int(file.read_text()) for file in Path(directory).glob("*.pid")]


def processor_seconds(pids: Iterable[int]) -> float:
    """Processor time, user and system, that processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def run_node(directory: str, name: str, seconds: float, ports: list[int]) -> None:
    """One node; the leader measures and leaves a file of JSON."""
    peers: dict[str, Address] = {each: (LOOPBACK, port) for each, port in zip(NAMES, ports, strict=True)}
    settings = RaftSettings(node=name, peers=peers, bind=peers[name], multiplier=3, data_dir=Path(directory) / name)
    log: Log = RaftThread(settings, Counter(), keyring=KEYRING, clock=SystemClock(), entropy=SystemEntropy())
    await log.start()
    (Path(directory) / f"{name}.pid").write_text(str(os.getpid()))
    await log.changed(leads, seen=False)
    await log.barrier()
    await asyncio.sleep(SETTLE)
    pids = written_pids(directory)
    await measure(log, pids, callers=IN_FLIGHT, seconds=0.5)
    figures = [await measure(log, pids, callers=callers, seconds=seconds) for callers in (1, IN_FLIGHT)]
    draft = Path(directory) / f"{name}.draft"
    draft.write_text(json.dumps(figures))
    draft.rename(Path(directory) / FIGURES)
    await log.fatal


def fsync_time(directory: Path) -> float:
    """Median seconds of one append and fdatasync of a command's size."""
    times = []
    with (directory / "fsync").open("ab", buffering=0) as file:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            file.write(COMMAND)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Least:
    """What a commit cannot do without, in seconds (medians)."""

    flush: float
    round_trip: float
    both: float

    @classmethod
    def measure(cls, directory: Path) -> Least:
        """As this machine does it now."""
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            place = Path(temporary)
            flush = fsync_time(place)
            round_trip = floor(place, NAMES[:2], flushed=False)
            return cls(flush, round_trip, floor(place, NAMES, flushed=True))


def run(seconds: float) -> None:
    """Start the three, wait for the leader's figures, print the table."""
    with tempfile.TemporaryDirectory(prefix="caserver-bench-") as temporary:
        before = Least.measure(Path(temporary))
        ports = [str(port) for port in free_ports(len(NAMES))]
        nodes = [start_node(temporary, name, seconds, ports) for name in NAMES]
        try:
            sequential, parallel = leaders_figures(Path(temporary) / FIGURES, within=seconds * 2 + 30)
        finally:
            for node in nodes:
                node.kill()
                node.wait()
        after = Least.measure(Path(temporary))
    for least in (before, after):
        print(
            f"fdatasync {least.flush * 1e3:.2f} ms, round trip over mutual TLS {least.round_trip * 1e3:.2f} ms,"
            f" both in three bare processes {least.both * 1e3:.2f} ms (medians)"
        )
    for figures in (sequential, parallel):
        print(
            f"{figures['callers']:>3.0f} in flight: {figures['rate']:8.0f} commits/s,"
            f" p50 {figures['p50'] * 1e3:6.2f} ms, p99 {figures['p99'] * 1e3:6.2f} ms, processor time {figures['cpu'] * 1e6:5.0f} us"
        )
    for least, when in ((before, "before"), (after, "after")):
        alone = sequential["p50"] / (least.flush + least.round_trip)
        print(
            f"sequential commit = {alone:.1f} x (fdatasync + round trip),"
            f" {sequential['p50'] / least.both:.1f} x three bare processes, as measured {when}"
        )


def start_node(directory: str, name: str, seconds: float, ports: list[str]) -> subprocess.Popen[bytes]:
    """One node as a process that dies with this one."""
    command = agent_command("agent", module=["scripts.bench_commit"])[:-1]
    return subprocess.Popen(
        [*command, directory, name, str(seconds), *ports],
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parent.parent,
    )


def leaders_figures(file: Path, *, within: float) -> list[dict[str, float]]:
    """What the node that leads measured: one in flight, many in flight."""
    end = time.monotonic() + within
    while not file.exists():
        if time.monotonic() > end:
            raise SystemExit("bench: no node finished measuring in time")
        time.sleep(0.05)
    found: list[dict[str, float]] = json.loads(file.read_text())
    return found


if __name__ == "__main__":
    asyncio.run(run_node(sys.argv[1], sys.argv[2], float(sys.argv[3]), [int(port) for port in sys.argv[4:]]))
