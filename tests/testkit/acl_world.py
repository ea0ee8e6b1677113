"""A node with ACLs on, and tokens of every kind for it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from caserver.config.acl_settings import ACLSettings
from caserver.fields import Secret
from tests.contract.world import Answered, World, running

MASTER = "11111111-0000-0000-0000-000000000001"  # that of the recordings
ON = ACLSettings(enabled=True, default_allow=False, initial_management=Secret(MASTER))
UNKNOWN = "22222222-0000-0000-0000-00000000dead"


@asynccontextmanager
async def guarded(settings: ACLSettings = ON, **options: Any) -> AsyncIterator[World]:
    """A running node that asks for tokens."""
    async with running(acl=settings, **options) as world:
        yield world


async def put(world: World, path: str, document: object = None, token: str = MASTER) -> Answered:
    body = b"" if document is None else json.dumps(document).encode()
    return await world.fetch("PUT", path, {"X-Consul-Token": token}, body)


async def get(world: World, path: str, token: str = MASTER) -> Answered:
    return await world.fetch("GET", path, {"X-Consul-Token": token} if token else {})


async def made_token(world: World, rules: str = "", **members: Any) -> dict[str, Any]:
    """A new token, with a policy of ``rules`` of its own unless they are empty."""
    if rules:
        name = f"p{len(world.log.state.acl.policies)}"
        policy = await put(world, "/v1/acl/policy", {"Name": name, "Rules": rules})
        assert policy.status == 200, policy.text
        members["Policies"] = [{"Name": name}]
    token = await put(world, "/v1/acl/token", members)
    assert token.status == 200, token.text
    found: dict[str, Any] = json.loads(token.text)
    return found


async def secret_of(world: World, rules: str) -> str:
    """The secret of a new token with these rules."""
    return str((await made_token(world, rules))["SecretID"])


def at(instant: str) -> float:
    """Epoch seconds of an instant as the API shows it."""
    return datetime.fromisoformat(instant).timestamp()
