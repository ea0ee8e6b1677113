"""Measure a real three-node cluster on loopback. Run it as scripts/bench sign.

scripts/bench commit measures the log alone, scripts/bench vault the Vault provider beside hvac alone.

The load generator shares the machine with the three nodes, so the figures are a lower bound. Any answer but 200 fails the
run, and a sample of the certificates is verified, so that nothing but finished work is counted. ``cpu us`` is the processor
time of the three nodes for a leaf, without the load generator's: what remains comparable on a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_acl, bench_commit, bench_vault
from scripts.bench_commit import processor_seconds
from tests.testkit.cluster import Cluster, Node
from tests.testkit.invariants import verifies

CSR_POOL = 512  # distinct keys and CSRs, made before the clock runs
SAMPLE = 25  # certificates verified after each measurement
WARM_UP = 1.0  # seconds, not counted


@dataclass(frozen=True, slots=True)
class Request:
    """A CSR and the public key that its certificate has to carry (SubjectPublicKeyInfo, DER)."""

    pem: str
    public_key: bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table; latencies are seconds."""

    through: str
    concurrency: int
    leaves: int
    seconds: float
    latencies: Sequence[float]
    worked: float  # seconds of processor time, of the three nodes

    def line(self) -> str:
        """Leaves a second, and how long one takes."""
        cuts = statistics.quantiles(self.latencies, n=100)
        return (
            f"{self.through:<10}{self.concurrency:>12}{self.leaves:>9}{self.leaves / self.seconds:>11.0f}"
            f"{cuts[49] * 1e3:>10.1f}{cuts[98] * 1e3:>10.1f}{max(self.latencies) * 1e3:>10.1f}{self.worked / self.leaves * 1e6:>10.0f}"
        )


def make_requests(trust_domain: str, count: int) -> list[Request]:
    """CSRs as proxies make them: P-256, one SPIFFE id."""
    return [make_request(f"spiffe://{trust_domain}/ns/default/dc/dc1/svc/bench-{each}") for each in range(count)]


def make_request(uri: str) -> Request:
    """One key, one CSR."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    csr = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
    pem = csr.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    return Request(pem, public_der(key.public_key()))


def public_der(key: Any) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


class Load:
    """Callers that sign as fast as they are answered, through one node."""

    def __init__(
        self, session: aiohttp.ClientSession, node: Node, requests: Sequence[Request], pids: Sequence[int]
    ) -> None:
        self._session, self._pids = session, pids
        self._url = f"{node.url}/v1/connect/ca/sign"
        self._requests = requests
        self._issued: list[tuple[Request, str]] = []
        self._latencies: list[float] = []

    async def run(self, through: str, *, concurrency: int, seconds: float) -> Figures:
        """Warm up, measure, verify a sample."""
        await self._drive(concurrency, WARM_UP)
        self._issued.clear()
        self._latencies.clear()
        worked, began = processor_seconds(self._pids), time.perf_counter()
        await self._drive(concurrency, seconds)
        took, worked = time.perf_counter() - began, processor_seconds(self._pids) - worked
        return Figures(through, concurrency, len(self._issued), took, tuple(self._latencies), worked)

    async def _drive(self, concurrency: int, seconds: float) -> None:
        end = time.perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(self._caller(number, end))

    async def _caller(self, number: int, end: float) -> None:
        at = number
        while time.perf_counter() < end:
            request = self._requests[at % len(self._requests)]
            at += 17  # so that callers do not walk in step
            began = time.perf_counter()
            async with self._session.put(self._url, data=request.pem) as response:
                if response.status != 200:  # noqa: PLR2004  the one answer that counts
                    raise SystemExit(f"bench: {response.status} from {self._url}: {await response.text()}")
                leaf = await response.json(content_type=None)
            self._latencies.append(time.perf_counter() - began)
            self._issued.append((request, leaf["CertPEM"]))

    def verify_sample(self, roots: set[str]) -> None:
        """The certificates carry the keys they were asked for and lead to a served root."""
        for request, pem in random.sample(self._issued, min(SAMPLE, len(self._issued))):
            key = public_der(x509.load_pem_x509_certificate(pem.encode()).public_key())
            if key != request.public_key or not verifies(pem, roots):
                raise SystemExit("bench: a certificate does not verify or carries another key")


def lift_limit(node: Node) -> None:
    """CSRMaxPerSecond 0: what is measured is the system, not its limiter."""
    shown = node.get("/v1/connect/ca/configuration").json()
    config = {**shown["Config"], "CSRMaxPerSecond": 0}
    reply = node.put("/v1/connect/ca/configuration", {"Provider": shown["Provider"], "Config": config})
    if reply.status != 200:  # noqa: PLR2004  the one answer that counts
        raise SystemExit(f"bench: {reply.status}: {reply.text}")


async def measure(cluster: Cluster, *, levels: Sequence[int], seconds: float) -> None:
    """Every level of concurrency through the leader and through a follower."""
    leader, follower = cluster.leader(), cluster.followers()[0]
    served = leader.get("/v1/connect/ca/roots").json()
    requests = await asyncio.to_thread(make_requests, served["TrustDomain"], CSR_POOL)
    roots = {root["RootCert"] for root in served["Roots"]}
    heads = f"{'through':<10}{'concurrency':>12}{'leaves':>9}{'leaves/s':>11}"
    print(heads + f"{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}{'cpu us':>10}")
    pids = [node.process.pid for node in cluster if node.process is not None]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        for through, node in (("leader", leader), ("follower", follower)):
            for concurrency in levels:
                load = Load(session, node, requests, pids)
                figures = await load.run(through, concurrency=concurrency, seconds=seconds)
                load.verify_sample(roots)
                print(figures.line(), flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "what",
        choices=["sign", "commit", "vault", "acl"],
        help="sign: PUT /v1/connect/ca/sign, one CSR a request; commit: the replicated log alone; "
        "vault: signing through the Vault provider beside hvac alone; acl: what strangers cost an authorised caller",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default 5)")
    parser.add_argument("--concurrency", default="1,16,64", help="comma-separated levels (default 1,16,64)")
    return parser.parse_args(arguments)


def main() -> int:
    """Start three nodes, lift the limit, measure."""
    options = parse(sys.argv[1:])
    if options.what == "commit":
        bench_commit.run(options.seconds)
        return 0
    if options.what == "vault":
        bench_vault.run(options.seconds)
        return 0
    if options.what == "acl":
        return bench_acl.run(options.seconds)
    levels = [int(level) for level in options.concurrency.split(",")]
    with tempfile.TemporaryDirectory(prefix="caserver-bench-") as temporary:
        print(f"==> starting three nodes ({os.cpu_count()} cores, shared with the load generator)", flush=True)
        settings = {"performance": {"raft_multiplier": 3}, "log_level": "WARN"}
        with Cluster(Path(temporary), settings=settings).start_ready() as cluster:
            lift_limit(cluster.nodes[0])
            asyncio.run(measure(cluster, levels=levels, seconds=options.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
