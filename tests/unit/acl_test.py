"""What rules grant: their two notations, their precedence, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.acl import (
    AGENT_READ,
    MANAGEMENT,
    NODE_READ,
    OPERATOR_READ,
    OPERATOR_WRITE,
    SERVICE_WRITE,
    Permission,
    Resource,
    Rules,
    authorize,
    could_authorize,
    parse_rules,
)
from caserver.errors import InvalidRequest
from caserver.state.acl import DENY, LIST, READ, WRITE, Grant

SERVICE_READ = Permission(Resource.SERVICE, READ)


def allowed(text: str, permission: Permission, *, default_allow: bool = False) -> bool:
    return authorize(Rules.of(parse_rules(text)), permission, default_allow=default_allow)


@pytest.mark.parametrize(
    ("rules", "permission", "expected"),
    [
        ('operator = "read"', OPERATOR_READ, True),
        ('operator = "read"', OPERATOR_WRITE, False),
        ('operator = "write"', OPERATOR_READ, True),
        ('operator = "deny"', OPERATOR_READ, False),
        ('acl = "write"', MANAGEMENT, True),
        ('acl = "read"', MANAGEMENT, False),
        ('acl = "write"', OPERATOR_READ, False),
        ('service "web" { policy = "write" }', SERVICE_WRITE.of("web"), True),
        ('service "web" { policy = "write" }', SERVICE_WRITE.of("web2"), False),
        ('service "web" { policy = "write" }', SERVICE_WRITE.of("Web"), False),
        ('service "web" { policy = "read" }', SERVICE_WRITE.of("web"), False),
        ('service "web" { policy = "read" }', SERVICE_READ.of("web"), True),
        ('service_prefix "we" { policy = "write" }', SERVICE_WRITE.of("web"), True),
        ('service_prefix "we" { policy = "write" }', SERVICE_WRITE.of("w"), False),
        ('service_prefix "" { policy = "write" }', SERVICE_WRITE.of("anything"), True),
        # The exact rule beats every prefix, the longest prefix the shorter ones, whatever they say.
        ('service "web" { policy = "deny" } service_prefix "" { policy = "write" }', SERVICE_WRITE.of("web"), False),
        ('service "web" { policy = "write" } service_prefix "" { policy = "deny" }', SERVICE_WRITE.of("web"), True),
        (
            'service_prefix "a" { policy = "deny" } service_prefix "ab" { policy = "write" }',
            SERVICE_WRITE.of("abc"),
            True,
        ),
        (
            'service_prefix "a" { policy = "write" } service_prefix "ab" { policy = "deny" }',
            SERVICE_WRITE.of("abc"),
            False,
        ),
        ('agent "n1" { policy = "read" }', AGENT_READ.of("n1"), True),
        ('agent "n1" { policy = "read" }', AGENT_READ.of("n2"), False),
        ('agent_prefix "" { policy = "write" }', AGENT_READ.of("n2"), True),
        ('node_prefix "" { policy = "read" }', NODE_READ.of("n1"), True),
        ('node_prefix "" { policy = "read" }', AGENT_READ.of("n1"), False),
        ('{"operator": "write"}', OPERATOR_WRITE, True),
        ('{"service": {"web": {"policy": "write"}}}', SERVICE_WRITE.of("web"), True),
        ('{"service": [{"web": {"policy": "write"}}, {"db": {"policy": "read"}}]}', SERVICE_WRITE.of("db"), False),
        ('{"service_prefix": {"": [{"policy": "write"}]}}', SERVICE_WRITE.of("db"), True),
        ("", OPERATOR_READ, False),
        ("  # nothing\n", OPERATOR_READ, False),
    ],
)
def test_rules_grant_what_consul_grants(rules: str, permission: Permission, expected: bool):
    assert allowed(rules, permission) is expected


def test_the_default_policy_decides_what_no_rule_speaks_of_but_never_management():
    rules = 'service "web" { policy = "deny" }'

    assert allowed(rules, OPERATOR_WRITE, default_allow=True)
    assert allowed(rules, SERVICE_WRITE.of("db"), default_allow=True)
    assert not allowed(rules, SERVICE_WRITE.of("web"), default_allow=True)
    assert not allowed(rules, MANAGEMENT, default_allow=True)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(WRITE, DENY, DENY), (DENY, WRITE, DENY), (READ, WRITE, WRITE), (WRITE, READ, WRITE), (LIST, READ, LIST)],
)
def test_of_several_policies_on_one_name_deny_wins_then_write(first: str, second: str, expected: str):
    rules = Rules.of([Grant("service", first, "web"), Grant("service", second, "web")])

    assert rules.says("service", "web") == expected


@given(
    st.lists(
        st.builds(
            Grant,
            st.just("service"),
            st.sampled_from([DENY, READ, WRITE]),
            st.text("ab", max_size=3),
            st.booleans(),
        )
    ),
    st.text("ab", min_size=1, max_size=3),
)
def test_the_order_of_policies_does_not_matter_and_the_most_specific_rule_decides(grants: list[Grant], name: str):
    found = Rules.of(grants).says("service", name)

    assert found == Rules.of(reversed(grants)).says("service", name)
    matching = [each for each in grants if (name.startswith(each.name) if each.prefix else name == each.name)]
    rank = max(((not each.prefix, len(each.name)) for each in matching), default=None)
    best = [each.access for each in matching if (not each.prefix, len(each.name)) == rank]
    strongest = next((access for access in (DENY, WRITE, READ) if access in best), None)
    assert found == strongest


def test_who_can_do_it_for_no_name_is_known_beforehand():
    nothing, prefix = Rules.of([]), Rules.of(parse_rules('service_prefix "a" { policy = "write" }'))

    assert not could_authorize(nothing, SERVICE_WRITE, default_allow=False)
    assert could_authorize(nothing, SERVICE_WRITE, default_allow=True)
    assert could_authorize(prefix, SERVICE_WRITE, default_allow=False)
    assert not could_authorize(
        Rules.of(parse_rules('service "a" { policy = "read" }')), SERVICE_WRITE, default_allow=False
    )


def test_what_only_consul_has_is_accepted_and_means_nothing():
    text = """
      key_prefix "" { policy = "list" }
      event "x" { policy = "write" }
      session_prefix "" { policy = "read" }
      query "q" { policy = "deny" }
      keyring = "write"
      service "web" { policy = "read" intentions = "write" }
    """

    assert parse_rules(text) == (Grant("service", READ, "web"),)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ('operator = "admin"', 'Invalid operator policy: "admin"'),
        ('acl = "list"', 'Invalid acl policy: "list"'),
        ("operator = 5", "Invalid operator policy: 5"),
        ('service "web" { policy = "list" }', 'Invalid service policy: "list" for "web"'),
        ('service "web" { }', 'Invalid service policy: null for "web"'),
        ('service "web" { policy = "read" intentions = "x" }', 'Invalid service intentions policy: "x"'),
        ('service_prefix "web" { police = "read" }', 'unknown member "police"'),
        ('service = "write"', '"service" expects names'),
        ('service "web" = "write"', "Failed to parse ACL rules: "),
        ('services "web" { policy = "read" }', '"services" is no resource; did you mean "service"?'),
        ('operator = "read', "Failed to parse ACL rules: "),
        ('{"operator": "read"', "Failed to parse ACL rules: "),
        ('{"operator": "read", "operator": "write"}', "given twice"),
        ('service "a" { policy = "read" }\nservice "a" { policy = "write" }', "given twice"),
        ("operator = " + "[" * 5000, "Failed to parse ACL rules: "),
        ("#" * 70_000, "Failed to parse ACL rules: they have more than 65536 characters"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules: str, text: str):
    with pytest.raises(InvalidRequest) as refused:
        parse_rules(rules)

    assert text in refused.value.detail
