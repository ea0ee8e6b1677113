"""The old root goes when its leaves are gone, whoever leads by then.

docs: "The old root certificate will be automatically removed once enough time has elapsed for any leaf certificates
signed by it to expire."
"""

from __future__ import annotations

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from caserver.pki.csr import make_csr
from caserver.requests import ChangeConfiguration, ConfigurationChanged, IssuedLeaf, LeavesSigned, SignLeaves
from tests.testkit.composition import Composition, Member, composed

LEAF_TTL = timedelta(hours=72)
ROTATE = '{"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": 384}}'


async def sign(member: Member, service: str) -> IssuedLeaf:
    key = ec.generate_private_key(ec.SECP256R1())
    uri = f"spiffe://{member.state.cluster_id}.consul/ns/default/dc/dc1/svc/{service}"
    answer = await member.execute(SignLeaves((make_csr(key, uri),)))
    assert isinstance(answer, LeavesSigned)
    (leaf,) = answer.results
    assert isinstance(leaf, IssuedLeaf)
    return leaf


async def rotated(composition: Composition) -> Member:
    """Bootstrapped, one leaf under the first root, then a second root; returns a follower."""
    await composition.everywhere(lambda state: len(state.roots) == 1)
    leader = await composition.leader()
    follower = next(member for member in composition.running if member is not leader)
    await sign(follower, "web")
    answer = await follower.execute(ChangeConfiguration(body=ROTATE))
    assert isinstance(answer, ConfigurationChanged)
    assert answer.rotated
    await composition.everywhere(lambda state: len(state.roots) == 2)
    return follower


@pytest.mark.parametrize("leader_leaves", [False, True])
async def test_the_old_root_is_pruned_once_its_leaves_are_gone(*, leader_leaves: bool) -> None:
    async with composed() as composition:
        follower = await rotated(composition)
        old = next(root for root in follower.state.roots if not root.active)
        assert old.sealed_key is not None

        composition.clock.step(2 * LEAF_TTL - timedelta(minutes=10))
        await sign(follower, "api")  # something happens, so that every node had its say
        assert len(follower.state.roots) == 2

        if leader_leaves:
            await (await composition.leader()).stop()
        composition.clock.step(timedelta(minutes=20))
        await sign(composition.running[0], "db")
        composition.clock.step(
            timedelta(minutes=2)
        )  # for so long a leader watches its clock before it removes anything
        await composition.everywhere(lambda state: [root.active for root in state.roots] == [True])

        survivor = await sign(composition.running[0], "web")
        assert survivor.root_id != old.id
