"""When the provider in force is looked at."""

from __future__ import annotations

import pytest

from caserver.errors import CaserverError, ProviderRefused
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, ManualClock
from tests.testkit.nodes import bootstrap_configuration, build_node, running

VAULT = {
    "Address": "https://vault:8200",
    "Token": "s.token",
    "RootPKIPath": "root-a",
    "IntermediatePKIPath": "inter-a",
    "CSRMaxPerSecond": 0,
}
SOON = 2.0  # seconds, where a look is due after thirty


async def test_the_first_signature_that_fails_has_the_signer_made_anew() -> None:
    clock = ManualClock()
    server = FakeVault(clock)
    node = build_node(FakeLog(), clock=clock, server=server, bootstrap=bootstrap_configuration())
    async with running(node):
        await node.configure(VAULT, provider="vault")
        await node.clock.advance(95)
        server.signers["inter-a"].clear()
        await node.clock.advance(SOON)
        assert server.standing == set()  # nobody has looked
        with pytest.raises(CaserverError):
            await node.sign("web")
        await node.clock.advance(SOON)
        assert await node.sign("web")


async def test_signatures_that_go_on_failing_are_looked_into_once_a_second_at_most() -> None:
    clock = ManualClock()
    server = FakeVault(clock)
    node = build_node(FakeLog(), clock=clock, server=server, bootstrap=bootstrap_configuration())
    async with running(node):
        await node.configure(VAULT, provider="vault")
        await node.clock.advance(95)
        node.external.failures["sign_leaves"] = ProviderRefused("permission denied")
        looks: list[str] = []
        server.step = lambda what: looks.extend([what] if what == "vault tend" else [])
        for _ in range(40):
            with pytest.raises(AssertionError, match="permission denied"):
                await node.sign("web")
            await node.clock.advance(0.1)
        assert 1 <= len(looks) <= 5
