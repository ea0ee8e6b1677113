"""Measure the replicated log alone: how long a durable commit takes, and how many there are a second with 64 under way.

Three processes on loopback with real disks and TLS; the leader proposes commands of a leaf's size. Beside it stands what a
commit cannot do without: one fdatasync and one round trip over mutual TLS 1.3.
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
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from caserver.environment import SystemClock, SystemEntropy
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring
from caserver.raft.ports import Committed, Leadership
from caserver.raft.streams import Address
from caserver.raft.thread import RaftSettings, RaftThread
from tests.testkit.cluster import LOOPBACK, agent_command, free_ports

NAMES = ("a", "b", "c")
KEYRING = Keyring([b"\x07" * 32])
COMMAND = b"x" * 200  # about one leaf's entry
IN_FLIGHT = 64
SETTLE = 1.0  # seconds between the election and the first measurement
FIGURES = "figures.json"  # what the leader leaves in the common directory
ROUNDS = 500  # of the fsync and of the round trip


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


async def measure(log: Log, directory: Path, *, callers: int, seconds: float) -> dict[str, float]:
    """Commits a second and latencies (seconds) with so many callers."""
    latencies: list[float] = []
    worked, began = nodes_cpu_seconds(directory), time.perf_counter()
    caller = one_more(log, latencies)
    await asyncio.gather(*(caller(began + seconds) for _ in range(callers)))
    took, worked = time.perf_counter() - began, nodes_cpu_seconds(directory) - worked
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "callers": callers,
        "rate": len(latencies) / took,
        "p50": cuts[49],
        "p99": cuts[98],
        "cpu": worked / len(latencies),
    }


def nodes_cpu_seconds(directory: Path) -> float:
    """Seconds of processor time, user and system, that the three nodes have used so far."""
    ticks = 0
    for file in directory.glob("*.pid"):
        fields = Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()
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
    await measure(log, Path(directory), callers=IN_FLIGHT, seconds=0.5)
    figures = [await measure(log, Path(directory), callers=callers, seconds=seconds) for callers in (1, IN_FLIGHT)]
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


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what comes, until the end."""
    while data := await reader.read(4096):
        writer.write(data)
    writer.close()
    await writer.wait_closed()


async def round_trip_time() -> float:
    """Median seconds of a command's size there and back over mutual TLS, both ends on one loop."""
    left, right = (NodeIdentity(KEYRING, name, NAMES) for name in NAMES[:2])
    server = await asyncio.start_server(echo, LOOPBACK, 0, ssl=right.server_context())
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=left.client_context(), server_hostname="")
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        writer.write(COMMAND)
        await reader.readexactly(len(COMMAND))
        times.append(time.perf_counter() - began)
    writer.close()
    await writer.wait_closed()
    server.close()
    await asyncio.sleep(0.1)  # the other end closes too
    return statistics.median(times)


def run(seconds: float) -> None:
    """Start the three, wait for the leader's figures, print the table."""
    with tempfile.TemporaryDirectory(prefix="caserver-bench-") as temporary:
        least = fsync_time(Path(temporary)), asyncio.run(round_trip_time())
        ports = [str(port) for port in free_ports(len(NAMES))]
        nodes = [start_node(temporary, name, seconds, ports) for name in NAMES]
        try:
            sequential, parallel = leaders_figures(Path(temporary) / FIGURES, within=seconds * 2 + 30)
        finally:
            for node in nodes:
                node.kill()
                node.wait()
    print(f"fdatasync {least[0] * 1e3:.2f} ms, round trip over mutual TLS {least[1] * 1e3:.2f} ms (medians)")
    for figures in (sequential, parallel):
        print(
            f"{figures['callers']:>3.0f} in flight: {figures['rate']:8.0f} commits/s,"
            f" p50 {figures['p50'] * 1e3:6.2f} ms, p99 {figures['p99'] * 1e3:6.2f} ms, processor time {figures['cpu'] * 1e6:5.0f} us"
        )
    print(f"sequential commit = {sequential['p50'] / sum(least):.1f} x (fdatasync + round trip)")


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
