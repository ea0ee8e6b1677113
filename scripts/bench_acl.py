"""What strangers cost an authorised caller: its latency alone, and beside a flood of requests without a token.

A node with ACLs on, one authorised caller on one connection, and as many connections of a stranger at another address as
one address may hold, each asking as fast as it is answered. Quiet and flooded slices alternate in one run, so that whatever
else the machine does falls on both; what counts is their ratio. The flood comes from a process of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.testkit.cluster import Cluster, Node  # noqa: E402 - after the path

TOKEN = "4a2e1d5c-0000-4000-8000-00000000beef"  # noqa: S105  of a throw-away cluster
STRANGER = "127.0.0.2"
CONNECTIONS = 200  # limits.http_max_conns_per_client
SLICES = 4  # of each kind
SETTLE = 0.3  # seconds at the begin of a slice that do not count
FLOODS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "no token": ("GET", "/v1/agent/connect/ca/leaf/web", {}, ""),
    "unknown token": ("GET", "/v1/connect/ca/configuration", {"X-Consul-Token": "nobody"}, ""),
    "sign": ("PUT", "/v1/connect/ca/sign", {}, "x" * 10_000),
    "configuration": ("PUT", "/v1/connect/ca/configuration", {}, json.dumps({"Provider": "consul", "Config": {}})),
    "roots": ("GET", "/v1/connect/ca/roots", {}, ""),
    "nowhere": ("GET", "/v1/nope", {}, ""),
}
ASKED = ("/v1/agent/connect/ca/leaf/web", "/v1/connect/ca/configuration", "/v1/operator/raft/configuration")


def request_bytes(method: str, path: str, headers: dict[str, str], body: str) -> bytes:
    """One HTTP/1.1 request."""
    lines = {"Host": "localhost", "Content-Length": str(len(body)), **headers}
    return (
        f"{method} {path} HTTP/1.1\r\n" + "".join(f"{a}: {b}\r\n" for a, b in lines.items()) + "\r\n" + body
    ).encode()


class Connection:
    """Asks one thing after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int, source: str | None = None) -> Connection:
        """A new one."""
        local = None if source is None else (source, 0)
        return cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=local))

    async def ask(self, request: bytes) -> int:
        """The status of the answer."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        await self._reader.readexactly(length)
        return int(head[9:12])


async def flood(port: int, kind: str) -> None:
    """Ask without end; one line of the number of answers each tenth of a second."""
    request = request_bytes(*FLOODS[kind])
    answers = itertools.count()

    async def stranger() -> None:
        connection = await Connection.open(port, STRANGER)
        while True:
            await connection.ask(request)
            next(answers)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(stranger())
        while True:
            await asyncio.sleep(0.1)
            print(next(answers), flush=True)


@contextmanager
def flooding(port: int, kind: str) -> Iterator[None]:
    """Strangers at work; over when the block ends."""
    command = [sys.executable, __file__, "flood", str(port), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        first = "0" if process.stdout is None else process.stdout.readline()
        while first.strip() == "0" and process.stdout is not None:
            first = process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True, slots=True)
class Figures:
    """Latencies in seconds: alone, and beside the flood; and how many of the flood were answered a second."""

    kind: str
    quiet: Sequence[float]
    flooded: Sequence[float]
    answered: float

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.flooded) / statistics.median(self.quiet)

    def line(self) -> str:
        """For the table."""
        tails = [statistics.quantiles(each, n=100)[98] * 1e3 for each in (self.quiet, self.flooded)]
        medians = [statistics.median(each) * 1e3 for each in (self.quiet, self.flooded)]
        return (
            f"{self.kind:<15}{self.answered:>12.0f}{medians[0]:>10.2f}{medians[1]:>10.2f}{self.ratio:>8.2f}"
            f"{tails[0]:>10.2f}{tails[1]:>10.2f}"
        )


async def timed(connection: Connection, seconds: float) -> list[float]:
    """Latencies of the authorised caller."""
    requests = [request_bytes("GET", path, {"X-Consul-Token": TOKEN}, "") for path in ASKED]
    found: list[float] = []
    begin = time.perf_counter() + SETTLE
    for request in itertools.cycle(requests):
        before = time.perf_counter()
        status = await connection.ask(request)
        after = time.perf_counter()
        if status != 200:  # noqa: PLR2004  the one answer that counts
            raise SystemExit(f"bench: the authorised caller was answered {status}")
        if after > begin + seconds:
            return found
        if after > begin:
            found.append(after - before)
    raise AssertionError("a cycle does not end")


async def measure(node: Node, kind: str, seconds: float) -> Figures:
    """Alternate quiet and flooded slices."""
    quiet: list[float] = []
    flooded: list[float] = []
    answered = 0.0
    connection = await Connection.open(node.http_port)
    for _ in range(SLICES):
        quiet += await timed(connection, seconds)
        before = _refusals(node)
        with flooding(node.http_port, kind):
            began = time.perf_counter()
            flooded += await timed(connection, seconds)
            answered += (_refusals(node) - before) / (time.perf_counter() - began)
    return Figures(kind, quiet, flooded, answered / SLICES)


def _refusals(node: Node) -> float:
    """Answers of the node so far."""
    text = node.get("/v1/agent/metrics?format=prometheus", headers={"X-Consul-Token": TOKEN}).text
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("caserver_http_requests")
    )


def run(seconds: float) -> int:
    """One line for each kind of flood; 1 if any slows the authorised caller by more than twice."""
    acl: dict[str, Any] = {
        "enabled": True,
        "default_policy": "deny",
        "tokens": {"initial_management": TOKEN},
    }
    worst = 0.0
    settings = {"acl": acl, "log_level": "ERROR"}
    with (
        tempfile.TemporaryDirectory(prefix="caserver-bench-") as temporary,
        Cluster(Path(temporary), ("n1",), settings=settings).start_ready() as cluster,
    ):
        print(
            f"{'strangers':<15}{'answers/s':>12}{'p50 ms':>10}{'flooded':>10}{'ratio':>8}{'p99 ms':>10}{'flooded':>10}"
        )
        for kind in FLOODS:
            figures = asyncio.run(measure(cluster.nodes[0], kind, seconds / SLICES))
            worst = max(worst, figures.ratio)
            print(figures.line(), flush=True)
    return 0 if worst <= 2.0 else 1  # noqa: PLR2004  what is promised


if __name__ == "__main__":
    asyncio.run(flood(int(sys.argv[2]), sys.argv[3]))
