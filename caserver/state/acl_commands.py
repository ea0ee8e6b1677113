"""The commands that change tokens and policies. Who decides them has checked them; apply keeps what must hold of the whole.

The indexes of the tokens and policies in here mean nothing: apply gives them. ``expect`` is the ModifyIndex of what is
replaced, 0 for something new.
"""

from __future__ import annotations

from dataclasses import dataclass

from caserver.state.acl import Policy, Token


@dataclass(frozen=True, slots=True)
class ACLInitialize:
    """Make what every cluster with ACLs has: the anonymous token, the policy for management, the token of the file."""

    at: int
    management: Policy  # written anew if this build understands its rules otherwise
    initial: Token | None  # passed over if there is a token with its secret; the first one counts as a bootstrap


@dataclass(frozen=True, slots=True)
class ACLBootstrap:
    """Make the first management token; ``reset_index`` is the index of the one before it that was lost, 0 if there was none."""

    request_id: str
    at: int
    token: Token
    reset_index: int


@dataclass(frozen=True, slots=True)
class SetToken:
    """Make or replace a token."""

    request_id: str
    at: int
    token: Token
    expect: int


@dataclass(frozen=True, slots=True)
class DeleteToken:
    """Forget a token."""

    request_id: str
    at: int
    accessor_id: str


@dataclass(frozen=True, slots=True)
class SetPolicy:
    """Make or replace a policy."""

    request_id: str
    at: int
    policy: Policy
    expect: int


@dataclass(frozen=True, slots=True)
class DeletePolicy:
    """Forget a policy; tokens that name it have it no more."""

    request_id: str
    at: int
    policy_id: str


ACLCommand = ACLInitialize | ACLBootstrap | SetToken | DeleteToken | SetPolicy | DeletePolicy
