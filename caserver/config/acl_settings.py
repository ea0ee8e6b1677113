"""The ``acl`` table: whether tokens are asked for, what holds where no rule speaks, and the tokens that a file may give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from caserver.config.reading import Reading
from caserver.fields import Fields, Secret

ALLOW, DENY = "allow", "deny"
_EXTEND_CACHE = "extend-cache"
_DOWN_POLICIES = {_EXTEND_CACHE: False, "async-cache": False, DENY: True}
_TOKEN = re.compile(r"[\x21-\x7e]{1,256}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


@dataclass(frozen=True, slots=True)
class ACLSettings:
    """Whether and how this node decides who may do what."""

    enabled: bool = False
    default_allow: bool = True  # what holds where no rule speaks; management is never given by default
    down_deny: bool = False  # while this node knows no leader: refuse, or trust its own copy of tokens and policies
    initial_management: Secret | None = field(default=None, repr=False)  # made by whoever leads, if it is not there
    agent: Secret | None = field(default=None, repr=False)  # what this node shows when it asks on its own behalf

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What no line of a log may hold."""
        return tuple(each for each in (self.initial_management, self.agent) if each is not None)


def read_acl(reading: Reading, given: Mapping[str, object]) -> ACLSettings:
    """The ``acl`` table."""
    fields = reading.section("acl", given)
    enabled = fields.flag("enabled")
    default_policy = fields.text("default_policy") or ALLOW
    if default_policy not in (ALLOW, DENY):
        fields.fault("default_policy", f'"{default_policy}" is no policy', "use deny or allow")
    down_policy = fields.text("down_policy") or _EXTEND_CACHE
    if down_policy not in _DOWN_POLICIES:
        remedy = 'use extend-cache or deny ("allow" would open this node to everybody as soon as it is cut off)'
        fields.fault("down_policy", f'"{down_policy}" is not offered', remedy)
    initial, agent = _tokens(reading, fields.mapping("tokens"))
    reading.done(fields)
    if enabled and default_policy == ALLOW:
        reading.warnings.append(
            'acl.default_policy: "allow", so whoever shows no token may do everything but manage ACLs; set "deny"'
        )
    if not enabled and (initial or agent):
        reading.warnings.append("acl.tokens: without effect while acl.enabled is false")
    return ACLSettings(
        enabled=enabled,
        default_allow=default_policy != DENY,
        down_deny=_DOWN_POLICIES.get(down_policy, True),
        initial_management=initial,
        agent=agent,
    )


def _tokens(reading: Reading, given: Mapping[str, object]) -> tuple[Secret | None, Secret | None]:
    fields = reading.section("acl.tokens", given)
    initial, older = _token(fields, "initial_management"), _token(fields, "master")
    if initial and older and initial != older:
        fields.fault("master", "an older name of initial_management, and they differ", "keep initial_management")
    agent = _token(fields, "agent")
    reading.done(fields)
    initial = initial or older
    if initial and not _UUID.fullmatch(initial.reveal()):
        reading.warnings.append("acl.tokens.initial_management: not a UUID; others can be guessed: use `uuidgen`")
    return initial, agent


def _token(fields: Fields, key: str) -> Secret | None:
    secret = fields.secret(key)
    if secret is None or not secret.reveal():
        return None
    if not _TOKEN.fullmatch(secret.reveal()):
        fields.fault(key, "not a token", "use a UUID, as `uuidgen` makes it")
    return secret
