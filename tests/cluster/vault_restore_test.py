"""A restore onto a CA at a Vault server, from a snapshot of such a CA, or both: leaves are signed after it, and what it left is tidied."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from caserver.backup import Backups
from caserver.environment import InlineWorkers, SystemEntropy
from caserver.errors import CaserverError
from caserver.internode.keyring import Keyring
from caserver.pki.csr import make_csr
from caserver.providers.vault.kind import vault_kind
from caserver.requests import Caller, ChangeConfiguration, ConfigurationChanged, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.model import CARoot, CAState
from caserver.state.vault_configuration import VaultLocal
from tests.testkit import openssl
from tests.testkit.composition import SECRET, WITHIN, Composition, Member, composed
from tests.testkit.openbao import Server, unique
from tests.testkit.vault import THREADS, VaultLab

BUILT_IN: dict[str, object] = {}
AGAIN = 0.1  # seconds between two tries of what takes its time


def at_vault(server: Server, root: str, intermediate: str) -> dict[str, object]:
    return {
        "Address": server.address,
        "Token": server.token,
        "RootPKIPath": root,
        "IntermediatePKIPath": intermediate,
    }


@dataclass(frozen=True, slots=True)
class Rig:
    """Three nodes, and one of them that does not lead."""

    composition: Composition
    through: Member
    backups: Backups

    @property
    def state(self) -> CAState:
        return self.through.state

    @property
    def active(self) -> CARoot:
        root = self.state.active_root
        assert root is not None
        return root

    async def put(self, config: Mapping[str, object], **changes: Any) -> None:
        provider = "vault" if "Address" in config else "consul"
        body = json.dumps({"Provider": provider, "Config": {**config, "CSRMaxPerSecond": 0, **changes}})
        answer = await self.through.execute(ChangeConfiguration(body=body))
        assert isinstance(answer, ConfigurationChanged)
        await self.composition.everywhere(lambda state: state.index >= answer.index)

    async def save(self) -> bytes:
        return b"".join(await self.backups.save(self.state))

    async def restore(self, data: bytes) -> None:
        index = await self.backups.restore(Caller(source="test"), io.BytesIO(data))
        await self.composition.everywhere(lambda state: state.index >= index)

    async def sign(self) -> IssuedLeaf:
        key = ec.generate_private_key(ec.SECP256R1())
        csr = make_csr(key, f"spiffe://{self.state.trust_domain}/ns/default/dc/dc1/svc/web")
        answer = await self.through.execute(SignLeaves((csr,)))
        assert isinstance(answer, LeavesSigned)
        (leaf,) = answer.results
        assert isinstance(leaf, IssuedLeaf), leaf
        return leaf

    async def signed(self) -> IssuedLeaf:
        """A leaf as soon as one can be had: what signs may have to be made anew."""

        async def repeat() -> IssuedLeaf:
            while True:
                try:
                    return await self.sign()
                except (CaserverError, AssertionError):
                    await asyncio.sleep(AGAIN)

        return await asyncio.wait_for(repeat(), WITHIN)

    async def tidied(self) -> None:
        """Let the time pass after which former providers are cleaned up, and wait until they are."""
        self.composition.clock.step(timedelta(seconds=100))
        await self.composition.everywhere(lambda state: not state.retiring)

    async def sound(self) -> None:
        """Wait until nothing is complained of: a look at the server that lies across a step of the clock took too long."""

        async def repeat() -> None:
            while (await self.composition.leader()).authority.degraded:
                self.composition.clock.step(timedelta(seconds=20))
                await asyncio.sleep(AGAIN)

        await asyncio.wait_for(repeat(), WITHIN)


@asynccontextmanager
async def rigged(lab: VaultLab) -> AsyncIterator[Rig]:
    def external(clock: Any) -> dict[str, Any]:
        return {"vault": vault_kind(VaultLocal(), clock=clock, workers=lab.workers, pool_size=THREADS)}

    async with composed(external=external) as composition:
        await composition.everywhere(lambda state: state.active_root is not None)
        leader = await composition.leader()
        through = next(member for member in composition.running if member is not leader)
        backups = Backups(
            through.raft,
            through.leader,
            keyring=Keyring([SECRET]),
            clock=composition.clock,
            entropy=SystemEntropy(),
            workers=InlineWorkers(),
            servers={},
            scratch=None,
        )
        yield Rig(composition, through, backups)


def made_for(server: Server, cluster_id: str | None) -> dict[str, list[str]]:
    """Names of the keys that were made for the cluster, by intermediate path."""
    assert cluster_id is not None
    found = {
        path: sorted(str(facts["key_name"]) for facts in server.keys_of(path).values())
        for path in server.mounts()
        if path.startswith("intermediate")
    }
    mine = {path: [name for name in names if cluster_id in name] for path, names in found.items()}
    return {path: names for path, names in mine.items() if names}


CASES = (
    "same CA",
    "same CA, tidied",
    "renewed",
    "other root",
    "other root, tidied",
    "elsewhere",
    "from built-in",
    "to built-in",
)


@pytest.mark.parametrize("case", CASES)
async def test_leaves_are_signed_after_a_restore_and_nothing_is_left(
    vault: VaultLab, tmp_path: Path, case: str
) -> None:
    server = vault.server
    first, second, signers = unique("root"), unique("root"), unique("intermediate")
    here, there = at_vault(server, first, signers), at_vault(server, second, signers)
    elsewhere = at_vault(server, second, f"{signers}-other")
    then, now = {
        "same CA": (here, here),
        "same CA, tidied": (here, here),
        "renewed": (here, at_vault(server, first, f"{signers}-other")),
        "other root": (here, there),
        "other root, tidied": (here, there),
        "elsewhere": (here, elsewhere),
        "from built-in": (BUILT_IN, here),
        "to built-in": (here, BUILT_IN),
    }[case]
    async with rigged(vault) as rig:
        await rig.put(then)
        saved, root = await rig.save(), rig.active
        await rig.put(now, LeafCertTTL="24h")
        if "tidied" in case or case in ("renewed", "to built-in"):
            await rig.tidied()
        await rig.sign()
        await rig.restore(saved)
        leaf = await rig.signed()

        assert (leaf.root_id, rig.active.id) == (root.id, root.id)
        assert openssl.accepts(tmp_path, leaf.chain_pem, root.pem)
        await rig.tidied()
        assert (await rig.sign()).signing_key_id == rig.active.signing_key_id
        expected = {} if then is BUILT_IN else {signers: [f"caserver-{rig.state.cluster_id}-{rig.active.epoch}"]}
        assert made_for(server, rig.state.cluster_id) == expected
        await rig.sound()


async def test_what_signs_is_not_removed_by_what_a_snapshot_owed(vault: VaultLab, tmp_path: Path) -> None:
    first, second, signers = unique("root"), unique("root"), unique("intermediate")
    here, there = (at_vault(vault.server, root, signers) for root in (first, second))
    async with rigged(vault) as rig:
        await rig.put(here)
        await rig.put(there)
        owing = await rig.save()  # the clean-up of what was made for the first root
        assert rig.state.retiring
        await rig.put(here)
        await rig.restore(owing)
        await rig.restore(owing)
        leaf = await rig.signed()
        assert openssl.accepts(tmp_path, leaf.chain_pem, rig.active.pem)
        await rig.tidied()
        assert (await rig.sign()).signing_key_id == rig.active.signing_key_id
        assert made_for(vault.server, rig.state.cluster_id) == {
            signers: [f"caserver-{rig.state.cluster_id}-{rig.active.epoch}"]
        }
