"""Rotations between CAs of every making under load: no request and no handshake fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from caserver.authority.gate import OPEN
from caserver.authority.ports import ProviderKind
from caserver.environment import Clock, SystemEntropy, ThreadWorkers
from caserver.leaf_cache import LeafCache
from caserver.node_gate import NodeGate
from caserver.providers.vault.kind import vault_kind
from caserver.requests import ChangeConfiguration, ConfigurationChanged
from caserver.state.vault_configuration import VaultLocal
from tests.contract.vault_rotation_test import matrix
from tests.testkit.composition import Composition, Member, composed
from tests.testkit.proxies import Habit, Mesh, Sidecar, meshed
from tests.testkit.vault import THREADS, VaultLab

# Each kind of crossing, both ways; every single pair is walked without load, see the contract of rotations.
WALK = (
    "generated",
    "vault A",
    "own EC",
    "vault B",
    "own RSA",
    "vault A",
    "vault B",
    "vault B elsewhere",
    "vault A",
    "generated",
)


def load(composition: Composition, caches: Mapping[str, LeafCache]) -> list[Sidecar]:
    """Two proxies at every node: one whose node makes its key, one that sends its own request; every habit with both."""
    found = []
    for number, member in enumerate(composition.members):
        habits = list(Habit)
        found.append(Sidecar(f"cached-{member.name}", member, habits[number], caches[member.name], spare=True))
        found.append(Sidecar(f"signed-{member.name}", member, habits[number - 1], None, spare=False))
    return found


@asynccontextmanager
async def cached(composition: Composition) -> AsyncIterator[dict[str, LeafCache]]:
    """What makes leaves at each node, running."""
    clock, caches = composition.clock, dict[str, LeafCache]()
    for member in composition.members:
        gate = NodeGate(OPEN, member.raft, member.leader, clock=clock)
        caches[member.name] = LeafCache(
            member.raft,
            member.leader,
            gate=gate,
            clock=clock,
            entropy=SystemEntropy(),
            datacenter="dc1",
            max_entries=100,
        )
    tasks = [asyncio.ensure_future(cache.run()) for cache in caches.values()]
    try:
        yield caches
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def rotate(composition: Composition, through: Member, config: Mapping[str, object]) -> ConfigurationChanged:
    provider = "vault" if "Address" in config else "consul"
    body = json.dumps({"Provider": provider, "Config": {**config, "CSRMaxPerSecond": 0}})
    changed = await through.execute(ChangeConfiguration(body=body))
    assert isinstance(changed, ConfigurationChanged)
    await composition.everywhere(lambda state: state.index >= changed.index)
    return changed


async def walk_under_load(
    composition: Composition, mesh: Mesh, walk: Sequence[str], configurations: Mapping[str, Mapping[str, object]]
) -> None:
    """From CA to CA, through each node in turn; who lags behind catches up before the next."""
    for number, (present, wanted) in enumerate(itertools.pairwise(walk)):
        mesh.step = f"{present} -> {wanted}"
        changed = await rotate(composition, composition.members[number % 3], configurations[wanted])
        await mesh.served()
        above = {each.root_id for each in mesh.sidecars}
        assert len(above) == (2 if changed.rotated else 1), mesh.step
        assert mesh.handshakes[mesh.step] > 0, mesh.step
        assert (mesh.mixed[mesh.step] > 0) or not changed.rotated, mesh.step
        mesh.catch_up()


async def test_no_request_and_no_handshake_fails_while_the_ca_is_rotated(vault: VaultLab) -> None:
    await rotate_under_load(vault, WALK)


async def rotate_under_load(vault: VaultLab, walk: Sequence[str]) -> Mesh:
    """Three nodes, six proxies, and the CAs of ``walk`` one after the other; what was done meanwhile, none of it in vain."""

    def external(clock: Clock) -> dict[str, ProviderKind]:
        return {"vault": vault_kind(VaultLocal(), clock=clock, workers=vault.workers, pool_size=THREADS)}

    workers = ThreadWorkers(1)
    async with composed(external=external) as composition, cached(composition) as caches:
        await composition.everywhere(lambda state: state.active_root is not None)
        trust_domain = composition.members[0].state.trust_domain
        assert trust_domain is not None
        configurations = matrix(vault.server, trust_domain=trust_domain)
        assert set(walk) == set(configurations)
        await rotate(composition, composition.members[0], configurations[walk[0]])  # without a limit from here on
        async with meshed(load(composition, caches), workers) as mesh:
            await walk_under_load(composition, mesh, walk, configurations)
        assert mesh.failures == []
        assert len(mesh.handshakes) >= len(walk) - 1
        assert mesh.requests > len(walk) * len(mesh.sidecars)
        workers.close()
        return mesh
