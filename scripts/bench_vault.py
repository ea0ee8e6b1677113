"""How much of what a Vault server can sign gets through the provider: scripts/bench vault.

The same server is driven in turns by hvac alone and by the provider, with as many threads and connections, so that load from
elsewhere hits both. Server and client share the machine: the ratio counts, not the figures.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hvac
import requests
import requests.adapters
from cryptography import x509

from caserver.authority.ports import Prepared, Provider, SignedLeaf, SigningOrder
from caserver.providers.vault.kind import POOL_SIZE
from tests.testkit import openbao
from tests.testkit.vault import VaultLab, listed, now, order

BATCH = 256  # leaves of one turn
SAMPLE = 25  # certificates verified after it all


def by_hvac(server: openbao.Server, prepared: Prepared, orders: Sequence[SigningOrder]) -> float:
    """Seconds that hvac alone takes for the orders, in a pool of the provider's size."""
    session = requests.Session()
    session.trust_env = False
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=POOL_SIZE, pool_block=True))
    client: Any = hvac.Client(url=server.address, token=server.token, session=session, timeout=30)
    backend = prepared.backend
    path = f"/v1/{backend['path']}/issuer/{backend['issuer']}/sign/{backend['role']}"

    def sign(wanted: SigningOrder) -> int:
        body = {
            "csr": wanted.csr_pem,
            "common_name": wanted.common_name,
            "uri_sans": [wanted.spiffe_uri],
            "exclude_cn_from_sans": True,
            "not_after": f"{datetime.fromtimestamp(wanted.not_after, UTC):%Y-%m-%dT%H:%M:%SZ}",
            "format": "pem",
        }
        return len(client.adapter.post(path, json=body)["data"]["certificate"])

    with ThreadPoolExecutor(POOL_SIZE) as pool:
        list(pool.map(sign, orders[:POOL_SIZE]))  # connections
        began = time.perf_counter()
        list(pool.map(sign, orders))
        took = time.perf_counter() - began
    session.close()
    return took


async def by_provider(provider: Provider, orders: Sequence[SigningOrder], issued: list[str]) -> float:
    """Seconds that the provider takes for the orders."""
    await provider.sign_leaves(orders[:POOL_SIZE])
    began = time.perf_counter()
    results = await provider.sign_leaves(orders)
    took = time.perf_counter() - began
    for result in results:
        if not isinstance(result, SignedLeaf):
            raise SystemExit(f"bench: {result}")
        issued.append(result.pem)
    return took


async def measure(server: openbao.Server, turns: int) -> None:
    """Turn by turn, hvac and the provider."""
    lab = VaultLab(server, threads=POOL_SIZE)
    configuration = lab.configuration()
    prepared = await lab.provider(configuration).prepare(now=now(), epoch=1)
    provider = lab.provider(configuration, listed(prepared))
    first = order()
    orders = [replace(first, issue_id=str(number)) for number in range(BATCH)]
    alone, through, issued = [], [], list[str]()
    for turn in range(turns):
        alone.append(by_hvac(server, prepared, orders))
        through.append(await by_provider(provider, orders, issued))
        print(f"turn {turn + 1}: hvac {BATCH / alone[-1]:.0f}/s, provider {BATCH / through[-1]:.0f}/s", flush=True)
    signer = x509.load_pem_x509_certificate(prepared.intermediates[0].encode())
    for pem in issued[:: max(1, len(issued) // SAMPLE)]:
        x509.load_pem_x509_certificate(pem.encode()).verify_directly_issued_by(signer)
    ratio = statistics.median(one / other for one, other in zip(alone, through, strict=True))
    print(f"{POOL_SIZE} threads, median of {turns} turns: the provider signs {ratio:.0%} of what hvac alone does")
    lab.close()


def run(seconds: float) -> None:
    """About as many turns as fit into the time."""
    with (
        tempfile.TemporaryDirectory(prefix="caserver-bench-") as temporary,
        openbao.in_memory(Path(temporary)) as server,
    ):
        asyncio.run(measure(server, turns=max(5, int(seconds))))
