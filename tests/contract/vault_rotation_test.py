"""Every rotation between two CAs of different making, on a real server: judged by openssl and by handshakes, and tidied up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from caserver.authority.authority import Authority
from caserver.authority.ports import Providers
from caserver.environment import InlineWorkers, SystemEntropy
from caserver.providers.builtin import builtin_kind
from caserver.providers.vault.kind import vault_kind
from caserver.raft.ports import Leadership
from caserver.requests import Caller, ChangeConfiguration, ConfigurationChanged, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.model import CARoot, CAState
from caserver.state.vault_configuration import VaultLocal
from tests.testkit import openssl
from tests.testkit.access import access
from tests.testkit.composition import SteppedClock
from tests.testkit.fakes import FakeLog
from tests.testkit.handshake import Proxy, shake
from tests.testkit.keys import key_pem
from tests.testkit.nodes import (
    CLUSTER_ID,
    DATACENTER,
    KEYRING,
    TRUST_DOMAIN,
    bootstrap_configuration,
    csr_for,
    operator_root,
)
from tests.testkit.openbao import Server, unique
from tests.testkit.vault import THREADS, VaultLab

WITHIN = 60.0  # seconds of real time for anything that is waited for
UNLIMITED = {"CSRMaxPerSecond": 0}


def _root(state: CAState, _leadership: Leadership) -> str | None:
    return None if state.active_root is None else state.active_root.id


def _owed(state: CAState, _leadership: Leadership) -> int:
    return len(state.retiring)


@dataclass(frozen=True, slots=True)
class Leader:
    """One leading node with real providers of both kinds."""

    log: FakeLog
    authority: Authority
    clock: SteppedClock

    @property
    def active(self) -> CARoot:
        root = self.log.state.active_root
        assert root is not None, self.authority.degraded
        return root

    async def put(self, config: Mapping[str, object]) -> ConfigurationChanged:
        provider = "vault" if "Address" in config else "consul"
        body = json.dumps({"Provider": provider, "Config": {**config, **UNLIMITED}})
        answer = await self.authority.execute(Caller(), ChangeConfiguration(body=body))
        assert isinstance(answer, ConfigurationChanged)
        return answer

    async def sign(self, service: str = "web") -> IssuedLeaf:
        answer = await self.authority.execute(Caller(), SignLeaves((csr_for(service),)))
        assert isinstance(answer, LeavesSigned)
        (leaf,) = answer.results
        assert isinstance(leaf, IssuedLeaf), leaf
        return leaf

    async def tidied(self) -> None:
        """Let the time pass after which former providers are cleaned up, and wait until they are."""
        self.clock.step(timedelta(seconds=100))
        owed = _owed(self.log.state, self.log.leadership)
        while owed:
            owed = await asyncio.wait_for(self.log.changed(_owed, owed), WITHIN)


@asynccontextmanager
async def leading(lab: VaultLab) -> AsyncIterator[Leader]:
    clock, entropy, log = SteppedClock(), SystemEntropy(), FakeLog()
    own = access(log, keyring=KEYRING, clock=clock, entropy=entropy)
    vault = vault_kind(VaultLocal(), clock=clock, workers=lab.workers, pool_size=THREADS)
    authority = Authority(
        log,
        providers=Providers({"consul": builtin_kind(clock, entropy, InlineWorkers()), "vault": vault}),
        keyring=KEYRING,
        clock=clock,
        entropy=entropy,
        workers=InlineWorkers(),
        datacenter=DATACENTER,
        bootstrap=bootstrap_configuration(),
        gate=own.gate,
        tokens=own.tokens,
    )
    running = asyncio.ensure_future(authority.run())
    guarding = asyncio.ensure_future(authority.watch_clock(lambda: asyncio.sleep(0, result=False)))
    try:
        await asyncio.wait_for(log.changed(_root, None), WITHIN)
        yield Leader(log, authority, clock)
    finally:
        for task in (running, guarding):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def matrix(server: Server, *, trust_domain: str = TRUST_DOMAIN) -> dict[str, dict[str, object]]:
    """The CAs between which is rotated."""
    first, second, signers = unique("root"), unique("root"), unique("intermediate")
    server.mount(second)
    server.ask(
        "POST", f"{second}/root/generate/internal", {"common_name": "Our Root", "key_type": "rsa", "ttl": "50000h"}
    )
    access_to = {"Address": server.address, "Token": server.token}
    return {
        "generated": {},
        "own EC": operator_root("ec-384", trust_domain=trust_domain),
        "own RSA": operator_root("rsa-2048", trust_domain=trust_domain),
        "vault A": {**access_to, "RootPKIPath": first, "IntermediatePKIPath": signers},
        "vault B": {**access_to, "RootPKIPath": second, "IntermediatePKIPath": signers},
        "vault B elsewhere": {**access_to, "RootPKIPath": second, "IntermediatePKIPath": f"{signers}-other"},
    }


def every_pair(names: list[str]) -> list[str]:
    """A walk from the first name in which each name is followed by each other one once; built-in CAs only by external ones."""
    left = {name: [other for other in names if other != name and "vault" in f"{name} {other}"] for name in names}
    walk, stack = list[str](), [names[0]]
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return walk[::-1]


def assert_accepted(
    directory: Path, step: str, *, before: tuple[CARoot, IssuedLeaf], after: tuple[CARoot, IssuedLeaf]
) -> None:
    """Old and new leaves under old and new bundles: by openssl, and by handshakes between who knows what."""
    (old_root, old_leaf), (new_root, new_leaf) = before, after
    both = old_root.pem + new_root.pem
    for name, leaf, bundle in (
        ("the new leaf under the old root", new_leaf, old_root.pem),
        ("the new leaf under the new root", new_leaf, new_root.pem),
        ("the old leaf under the old root", old_leaf, old_root.pem),
        ("the old leaf under both roots", old_leaf, both),
    ):
        assert openssl.accepts(directory, leaf.chain_pem, bundle), f"{step}: openssl refuses {name}"
    key = key_pem("ec-256")
    newcomer = Proxy(new_leaf.chain_pem, key, both)
    for other in (Proxy(old_leaf.chain_pem, key, old_root.pem), Proxy(new_leaf.chain_pem, key, new_root.pem)):
        seen = (new_leaf.service_uri,)
        assert [tuple(each) for each in shake(newcomer, other)] == [seen, seen], step
        assert [tuple(each) for each in shake(other, newcomer)] == [seen, seen], step


async def test_every_rotation_between_two_cas_is_seamless_and_leaves_nothing_behind(
    vault: VaultLab, tmp_path: Path
) -> None:
    configurations = matrix(vault.server)
    walk = every_pair(list(configurations))
    assert len(set(itertools.pairwise(walk))) == len(walk) - 1 == 3 * 5 + 3 * 3
    async with leading(vault) as leader:
        for present, wanted in itertools.pairwise(walk):
            before = leader.active, await leader.sign()
            changed = await leader.put(configurations[wanted])
            after = leader.active, await leader.sign()
            step = f"{present} -> {wanted}"
            assert changed.rotated == (before[0].id != after[0].id), step
            assert changed.rotated != ({present, wanted} == {"vault B", "vault B elsewhere"}), step
            assert_accepted(tmp_path, step, before=before, after=after)
        await leader.put(configurations["vault A"])
        await leader.tidied()
        await leader.sign()
        signers = str(configurations["vault A"]["IntermediatePKIPath"])
        assert ours(vault.server, signers) == {signers: [f"caserver-{CLUSTER_ID}-{leader.active.epoch}"]}
        assert leader.authority.degraded == ()


def ours(server: Server, signers: str) -> dict[str, list[str]]:
    """Names of the keys that were made for the cluster, by path from ``signers`` on; each has its issuer, no other is there.

    Other tests leave engines of the same cluster behind at paths of their own.
    """
    found: dict[str, list[str]] = {}
    for path in server.mounts():
        if path not in {signers, f"{signers}-other"}:
            continue
        names = {key: str(facts["key_name"]) for key, facts in server.keys_of(path).items()}
        mine = sorted(name for name in names.values() if CLUSTER_ID in name)
        if mine:
            found[path] = mine
            assert len(server.issuers(path)) == len(names)
    return found


@pytest.mark.parametrize("lost", ["issuer", "mount"])
async def test_an_issuer_that_somebody_removed_is_made_anew(vault: VaultLab, lost: str) -> None:
    configuration = matrix(vault.server)["vault A"]
    path = str(configuration["IntermediatePKIPath"])
    async with leading(vault) as leader:
        await leader.put(configuration)
        signer, epoch = leader.active.signing_key_id, leader.log.state.ca_epoch
        if lost == "mount":
            vault.server.ask("DELETE", f"sys/mounts/{path}")
        else:
            for issuer in vault.server.issuers(path):
                vault.server.ask("DELETE", f"{path}/issuer/{issuer}")
        leader.clock.step(timedelta(seconds=60))

        def renewed(state: CAState, _leadership: Leadership) -> bool:
            return state.ca_epoch > epoch

        while not renewed(leader.log.state, leader.log.leadership):
            await asyncio.wait_for(leader.log.changed(renewed, False), WITHIN)
        assert leader.active.signing_key_id != signer
        assert (await leader.sign()).signing_key_id == leader.active.signing_key_id
