"""The tokens that the recordings with access control were taken with, made anew with the recorded secrets."""

from __future__ import annotations

import json
from typing import Any

from tests.contract.world import World
from tests.testkit.acl_world import MASTER, made_token, put

# Part of a recording's name -> the rules of the token that was shown.
RULES = {
    "nodewrite": 'node_prefix "" { policy = "write" }',
    "opread": 'operator = "read"',
    "opwrite": 'operator = "write"',
    "svcprefixwrite": 'service_prefix "we" { policy = "write" }',
    "svcread": 'service "web" { policy = "read" }',
    "svcwrite": 'service "web" { policy = "write" }',
    "form": 'operator = "write"',
}
FORM_TOKEN = "705611c9-78f7-f98c-79d1-6053dedb12fc"
SERVICE_TOKEN = "4e6b6ce9-6d25-0f73-1b8d-07a2757569b0"
CHANGED = {"Provider": "consul", "Config": {"LeafCertTTL": "40h"}}


async def grant(world: World, recording: dict[str, Any]) -> None:
    """Make what the recorded node had: the token that is shown, a cached leaf, a changed configuration."""
    name = recording["name"]
    kind = next((each for each in name.split("-") if each in RULES), None)
    secret = FORM_TOKEN if kind == "form" else dict(recording["request"]["headers"]).get("X-Consul-Token", "")
    if kind is not None and secret:
        await made_token(world, RULES[kind], SecretID=secret)
    if "leafcache" in name:
        if secret != SERVICE_TOKEN:
            await made_token(world, RULES["svcwrite"], SecretID=SERVICE_TOKEN)
        cached = await world.fetch("GET", recording["request"]["path"], {"X-Consul-Token": SERVICE_TOKEN})
        assert cached.status == 200, cached.text
    if '"LeafCertTTL": "40h"' in str(recording["response"]["body"]):
        changed = await put(world, "/v1/connect/ca/configuration", CHANGED, token=MASTER)
        assert changed.status == 200, json.dumps(CHANGED)
