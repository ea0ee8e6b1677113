from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from caserver.config.acl_settings import ACLSettings
from caserver.fields import Secret
from tests.unit.config_agent_config_test import SINGLE, faults, load


def acl(given: Mapping[str, object], *, at: Path) -> ACLSettings:
    return load({**SINGLE, "acl": given}, at=at).acl


def test_acls_are_off_unless_they_are_enabled(tmp_path: Path) -> None:
    assert not load(SINGLE, at=tmp_path).acl.enabled
    assert acl({"enabled": True}, at=tmp_path) == ACLSettings(enabled=True, default_allow=True)


def test_the_settings_of_acls_are_those_of_the_file(tmp_path: Path) -> None:
    tokens = {"master": "6c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57", "agent": "0c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57"}

    found = acl(
        {"enabled": True, "default_policy": "deny", "down_policy": "deny", "tokens": tokens, "token_ttl": "30s"},
        at=tmp_path,
    )

    assert found == ACLSettings(
        enabled=True,
        default_allow=False,
        down_deny=True,
        initial_management=Secret(tokens["master"]),
        agent=Secret(tokens["agent"]),
    )
    assert "6c1fa2f8" not in repr(found)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"default_policy": "maybe"}, 'acl.default_policy: "maybe" is no policy; use deny or allow'),
        ({"down_policy": "allow"}, 'acl.down_policy: "allow" is not offered; use extend-cache or deny'),
        ({"tokens": {"agent": "two words"}}, "acl.tokens.agent: not a token; "),
        ({"tokens": {"master": "a" * 20, "initial_management": "b" * 20}}, "acl.tokens.master: an older name of"),
        ({"tokens": {"initial": "x"}}, "acl.tokens.initial: unknown key"),
        ({"enable": True}, 'acl.enable: unknown key; did you mean "enabled"?'),
    ],
)
def test_wrong_settings_of_acls_are_refused_without_showing_a_token(
    tmp_path: Path, given: Mapping[str, object], fault: str
) -> None:
    found = faults({**SINGLE, "acl": {"enabled": True, **given}}, at=tmp_path)

    assert len(found) == 1
    assert found[0].startswith(f"0.json: {fault}")
    assert "two words" not in found[0]


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ({"enabled": True}, 'acl.default_policy: "allow", so whoever shows no token may do everything but manage ACLs'),
        ({"tokens": {"agent": "x" * 20}}, "acl.tokens: without effect while acl.enabled is false"),
        (
            {"enabled": True, "default_policy": "deny", "tokens": {"initial_management": "secret"}},
            "acl.tokens.initial_management: not a UUID",
        ),
        (
            {"enabled": True, "default_policy": "deny", "tokens": {"default": "x"}},
            "keys of Consul without a meaning here, ignored: acl.tokens.default",
        ),
    ],
)
def test_what_is_likely_a_mistake_about_acls_is_a_warning(
    tmp_path: Path, given: Mapping[str, object], warning: str
) -> None:
    warnings = load({**SINGLE, "acl": given}, at=tmp_path).warnings

    assert any(each.startswith(warning) for each in warnings)
