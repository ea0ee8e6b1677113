"""The decision on a caller, made on one node's copy: tokens, their policies, their end; and what is written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import structlog

from caserver.acl import MANAGEMENT, NODE_READ, OPERATOR_READ, SERVICE_WRITE, parse_rules
from caserver.authority.custody import HMAC_KEY_PURPOSE
from caserver.authority.gate import OPEN, TokenGate, TokenHasher, admit, hazard
from caserver.config.acl_settings import ACLSettings
from caserver.errors import PermissionDenied, Unavailable
from caserver.fields import Secret
from caserver.internode.keyring import Keyring
from caserver.requests import Caller
from caserver.state.acl import ANONYMOUS_ID, ServiceIdentity
from caserver.state.acl_commands import ACLInitialize, DeleteToken, SetPolicy, SetToken
from caserver.state.commands import Applied, Bootstrap, Reseal
from tests.testkit.acl_states import MANAGEMENT as BUILTIN
from tests.testkit.acl_states import policy, token
from tests.testkit.fakes import FakeLog, ManualClock
from tests.testkit.states import CLUSTER_ID, stored

DENY = ACLSettings(enabled=True, default_allow=False)
KEYRING = Keyring([bytes(32)])
SECRET = Secret("0c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57")
CALLER = Caller(token=SECRET, source="n1 10.0.0.1:5")
NONCE = bytes(12)


class Rig:
    def __init__(self, settings: ACLSettings = DENY, keyring: Keyring = KEYRING) -> None:
        self.log, self.clock = FakeLog(), ManualClock()
        self.now = int(self.clock.now().timestamp())
        sealed = KEYRING.seal(b"h" * 32, purpose=HMAC_KEY_PURPOSE, nonce=NONCE)
        self.log.commit(Bootstrap(self.now, CLUSTER_ID, stored(), sealed))
        self.log.commit(ACLInitialize(self.now, BUILTIN, None))
        self.hasher = TokenHasher(keyring)
        self.gate = TokenGate(self.log, settings=settings, hasher=self.hasher, clock=self.clock, datacenter="dc1")
        self.commits = 0

    def commit(self, make: object) -> None:
        self.commits += 1
        assert isinstance(make, SetPolicy | SetToken | DeleteToken)
        result = self.log.commit(replace(make, request_id=f"r{self.commits}"))
        assert isinstance(result, Applied), result

    def give(self, rules: str, **changes: object) -> None:
        """A token with a policy of these rules."""
        self.commit(SetPolicy("", self.now, policy("p1", rules=rules, grants=parse_rules(rules)), 0))
        made = token("a1", secret_hash=self.hasher.hash(self.log.state, SECRET), policies=("p1",))
        self.commit(SetToken("", self.now, replace(made, created_at=self.now, **changes), 0))  # type: ignore[arg-type]


def test_an_open_gate_lets_everybody_do_everything() -> None:
    assert OPEN.refusal(Caller(), MANAGEMENT) is None
    assert OPEN.refusal(CALLER, SERVICE_WRITE.of("web")) is None


def test_what_needs_nothing_asks_no_token() -> None:
    assert Rig().gate.refusal(CALLER, None) is None


def test_a_token_grants_what_its_policies_grant() -> None:
    rig = Rig()
    rig.give('operator = "read" service "web" { policy = "write" }')

    assert rig.gate.refusal(CALLER, OPERATOR_READ) is None
    assert rig.gate.refusal(CALLER, SERVICE_WRITE.of("web")) is None
    assert str(rig.gate.refusal(CALLER, SERVICE_WRITE.of("db"))) == "Permission denied"
    assert str(rig.gate.refusal(Caller(), OPERATOR_READ)) == "Permission denied"
    assert str(rig.gate.refusal(Caller(token=Secret("other")), OPERATOR_READ)) == "ACL not found"


def test_who_may_write_some_service_is_heard_before_it_is_known_which() -> None:
    rig = Rig()
    rig.give('service_prefix "w" { policy = "write" }')

    assert rig.gate.refusal(CALLER, SERVICE_WRITE) is None
    assert rig.gate.refusal(Caller(), SERVICE_WRITE) is not None


def test_an_expired_or_deleted_token_is_none() -> None:
    rig = Rig()
    rig.give('operator = "read"', expires_at=rig.now + 60)

    assert rig.gate.refusal(CALLER, OPERATOR_READ) is None
    rig.clock.jump(60)
    assert str(rig.gate.refusal(CALLER, OPERATOR_READ)) == "ACL not found"
    assert rig.gate.accessor(CALLER) == "a1"
    assert rig.gate.token(CALLER) is None
    rig.commit(DeleteToken("", rig.now, "a1"))
    assert rig.gate.accessor(CALLER) == "unknown"


def test_policies_and_identities_of_other_datacenters_grant_nothing() -> None:
    rig = Rig()
    here, there = ServiceIdentity("web", ("dc1",)), ServiceIdentity("db", ("dc2",))
    rig.commit(
        SetPolicy("", rig.now, replace(policy("p2", grants=parse_rules('operator = "read"')), datacenters=("dc2",)), 0)
    )
    made = token("a1", secret_hash=rig.hasher.hash(rig.log.state, SECRET), policies=("p2",))
    rig.commit(SetToken("", rig.now, replace(made, service_identities=(here, there)), 0))

    assert rig.gate.refusal(CALLER, OPERATOR_READ) is not None
    assert rig.gate.refusal(CALLER, SERVICE_WRITE.of("web")) is None
    assert rig.gate.refusal(CALLER, SERVICE_WRITE.of("web-sidecar-proxy")) is None
    assert rig.gate.refusal(CALLER, SERVICE_WRITE.of("db")) is not None
    assert rig.gate.refusal(CALLER, NODE_READ.of("n1")) is None


def test_secrets_are_hashed_under_the_key_whatever_seals_it() -> None:
    rig = Rig()
    before = rig.hasher.hash(rig.log.state, SECRET)
    again = KEYRING.seal(b"h" * 32, purpose=HMAC_KEY_PURPOSE, nonce=b"\x01" * 12)
    rig.log.commit(Reseal(rig.now, rig.log.state.roots_index, (("hmac", again),)))

    assert rig.log.state.sealed_hmac_key == again
    assert rig.hasher.hash(rig.log.state, SECRET) == before
    assert rig.hasher.hash(rig.log.state, Secret("other")) != before
    assert SECRET.reveal().encode() not in before


def test_a_node_that_cannot_open_the_key_says_so() -> None:
    rig = Rig(keyring=Keyring([b"?" * 32]))

    with pytest.raises(Unavailable, match="no token can be checked on this node"):
        rig.gate.refusal(CALLER, OPERATOR_READ)
    assert rig.gate.refusal(Caller(), OPERATOR_READ) is not None


def test_a_refusal_is_written_down_with_the_accessor_id_alone() -> None:
    rig = Rig()
    rig.give('operator = "read"')

    with structlog.testing.capture_logs() as lines:
        with pytest.raises(PermissionDenied):
            admit(rig.gate, CALLER, SERVICE_WRITE.of("web"), operation="SignLeaves")
        with pytest.raises(PermissionDenied):
            admit(rig.gate, Caller(source="n2 x"), MANAGEMENT, operation="PUT /v1/acl/token")
        admit(rig.gate, CALLER, OPERATOR_READ, operation="ReadServers")

    assert lines == [
        {
            "event": "access denied",
            "log_level": "warning",
            "accessor": "a1",
            "source": "n1 10.0.0.1:5",
            "operation": "SignLeaves",
            "needs": "service:write on web",
            "reason": "Permission denied",
        },
        {
            "event": "access denied",
            "log_level": "warning",
            "accessor": ANONYMOUS_ID,
            "source": "n2 x",
            "operation": "PUT /v1/acl/token",
            "needs": "acl:write",
            "reason": "Permission denied",
        },
    ]


def test_a_node_that_asks_for_no_tokens_where_there_are_some_is_a_hazard() -> None:
    rig = Rig()

    assert hazard(DENY, rig.log.state) is None
    assert hazard(ACLSettings(), FakeLog().state) is None
    assert "set acl { enabled = true } as on the others" in (hazard(ACLSettings(), rig.log.state) or "")
