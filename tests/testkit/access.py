"""Access control for compositions of tests: off, or on with settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from caserver.authority.gate import OPEN, Gate, TokenGate, TokenHasher
from caserver.authority.ports import Log
from caserver.authority.tokens import Tokens
from caserver.config.acl_settings import ACLSettings
from caserver.environment import Clock, Entropy, InlineWorkers
from caserver.internode.keyring import Keyring

OFF = ACLSettings()


@dataclass
class FakeReset:
    """The bootstrap reset file of a node without a disk."""

    index: int = 0
    removed: int = field(default=0)

    def read(self) -> int:
        return self.index

    def remove(self) -> None:
        self.index = 0
        self.removed += 1


@dataclass(frozen=True)
class Access:
    """What decides who may do what on one node."""

    gate: Gate
    tokens: Tokens
    reset: FakeReset


def access(
    log: Log, *, keyring: Keyring, clock: Clock, entropy: Entropy, settings: ACLSettings = OFF, datacenter: str = "dc1"
) -> Access:
    hasher, reset = TokenHasher(keyring), FakeReset()
    gate: Gate = OPEN
    if settings.enabled:
        gate = TokenGate(log, settings=settings, hasher=hasher, clock=clock, datacenter=datacenter)
    tokens = Tokens(
        log, settings=settings, hasher=hasher, reset=reset, clock=clock, entropy=entropy, workers=InlineWorkers()
    )
    return Access(gate, tokens, reset)
