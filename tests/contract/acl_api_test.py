"""``/v1/acl``: tokens and policies over HTTP, their documents, their texts, and that no secret is ever shown twice."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from caserver.state.acl import ANONYMOUS_ID, MANAGEMENT_ID
from tests.contract.world import CLUSTER_ID, World, running
from tests.testkit.acl_world import MASTER, ON, UNKNOWN, get, guarded, made_token, put
from tests.testkit.nodes import csr_for

WEB = 'service "web" { policy = "write" }'
UUID = "b6b856da-5193-4e78-845a-7d61ca8371ba"
OTHER = "c01a1f82-44be-41b0-a686-685fb6e0f485"
CONFIGURATION = "/v1/connect/ca/configuration"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with guarded() as found:
        yield found


async def delete(world: World, path: str, token: str = MASTER) -> Any:
    return await world.fetch("DELETE", path, {"X-Consul-Token": token})


async def test_a_token_is_shown_with_its_secret_once_and_never_again(world: World) -> None:
    policy = json.loads((await put(world, "/v1/acl/policy", {"Name": "web", "Rules": WEB})).text)
    made = await put(world, "/v1/acl/token", {"Description": "for web", "Policies": [{"Name": "web"}]})
    token = json.loads(made.text)
    secret = token["SecretID"]

    assert list(token) == [
        "AccessorID",
        "SecretID",
        "Description",
        "Policies",
        "Local",
        "CreateTime",
        "Hash",
        "CreateIndex",
        "ModifyIndex",
    ]
    assert token["Policies"] == [{"ID": policy["ID"], "Name": "web"}]
    one = await get(world, f"/v1/acl/token/{token['AccessorID']}")
    listed = await get(world, "/v1/acl/tokens")
    own = await get(world, "/v1/acl/token/self", secret)
    again = await put(world, f"/v1/acl/token/{token['AccessorID']}", {**token, "Description": "changed"})
    for answer in (one, listed, own, again):
        assert answer.status == 200, answer.text
        assert secret not in answer.text
    assert json.loads(one.text) == {**token, "SecretID": "<hidden>"}
    assert json.loads(own.text) == json.loads(one.text)
    assert json.loads(again.text)["Description"] == "changed"
    stub = next(each for each in json.loads(listed.text) if each["AccessorID"] == token["AccessorID"])
    assert list(stub) == [name for name in token if name != "SecretID"]
    assert listed.headers["X-Consul-Index"] == str(stub["ModifyIndex"])
    assert (await get(world, "/v1/agent/connect/ca/leaf/web", secret)).status == 200


async def test_what_is_kept_of_a_secret_is_a_keyed_hash(world: World) -> None:
    token = await made_token(world, WEB)

    kept = world.log.state.acl.tokens[token["AccessorID"]]

    assert len(kept.secret_hash) == 32
    assert token["SecretID"] not in repr(world.log.state)
    assert repr(kept.secret_hash) not in repr(kept)
    assert all(token["SecretID"] not in repr(command) for command, _ in world.log.entries)


async def test_a_policy_is_made_read_changed_listed_and_deleted(world: World) -> None:
    made = await put(world, "/v1/acl/policy", {"Name": "web", "Description": "d", "Rules": WEB, "Datacenters": ["dc1"]})
    policy = json.loads(made.text)

    assert list(policy) == [
        "ID",
        "Name",
        "Description",
        "Rules",
        "Datacenters",
        "Hash",
        "CreateIndex",
        "ModifyIndex",
    ]
    by_id = await get(world, f"/v1/acl/policy/{policy['ID'].upper()}")
    by_name = await get(world, "/v1/acl/policy/name/web")
    assert json.loads(by_id.text) == json.loads(by_name.text) == policy
    listed = json.loads((await get(world, "/v1/acl/policies")).text)
    assert [each["ID"] for each in listed] == sorted([MANAGEMENT_ID, policy["ID"]])
    assert list(listed[0]) == ["ID", "Name", "Description", "Datacenters", "Hash", "CreateIndex", "ModifyIndex"]
    assert listed[0]["Datacenters"] is None
    changed = await put(world, f"/v1/acl/policy/{policy['ID']}", {"Name": "renamed", "Rules": ""})
    assert json.loads(changed.text)["CreateIndex"] == policy["CreateIndex"] < json.loads(changed.text)["ModifyIndex"]
    assert (await delete(world, f"/v1/acl/policy/{policy['ID']}")).text.strip() == "true"
    assert (await delete(world, f"/v1/acl/policy/{policy['ID']}")).text.strip() == "true"
    gone = await get(world, f"/v1/acl/policy/{policy['ID']}")
    assert (gone.status, gone.text) == (403, "ACL not found")


async def test_a_changed_policy_counts_for_the_tokens_that_have_it(world: World) -> None:
    token = await made_token(world, WEB)
    (link,) = token["Policies"]
    path = f"/v1/acl/policy/{link['ID']}"

    assert (await get(world, "/v1/agent/connect/ca/leaf/web", token["SecretID"])).status == 200
    await put(world, path, {"Name": link["Name"], "Rules": 'service "web" { policy = "deny" }'})
    assert (await get(world, "/v1/agent/connect/ca/leaf/web", token["SecretID"])).status == 403
    await put(world, path, {"Name": link["Name"], "Rules": WEB, "Datacenters": ["elsewhere"]})
    assert (await get(world, "/v1/agent/connect/ca/leaf/web", token["SecretID"])).status == 403
    await put(world, path, {"Name": link["Name"], "Rules": WEB})
    assert (await get(world, "/v1/agent/connect/ca/leaf/web", token["SecretID"])).status == 200


async def test_a_service_identity_stands_for_the_service_and_its_proxy(world: World) -> None:
    token = await made_token(world, ServiceIdentities=[{"ServiceName": "web"}])

    for service, status in (("web", 200), ("web-sidecar-proxy", 200), ("web2", 403), ("db", 403)):
        answer = await get(world, f"/v1/agent/connect/ca/leaf/{service}", token["SecretID"])
        assert answer.status == status, service
    assert (await get(world, "/v1/agent/members", token["SecretID"])).status == 200


async def test_a_clone_stands_for_the_same_under_another_secret(world: World) -> None:
    token = await made_token(world, WEB, Description="first")
    path = f"/v1/acl/token/{token['AccessorID']}/clone"

    same = json.loads((await put(world, path, {})).text)
    named = json.loads((await put(world, path, {"Description": "second"})).text)

    nothing_said = await world.fetch("PUT", path, {"X-Consul-Token": MASTER})

    assert json.loads(nothing_said.text)["Description"] == "first"
    assert (same["Description"], named["Description"]) == ("first", "second")
    assert same["Policies"] == token["Policies"]
    assert len({token["SecretID"], same["SecretID"], named["SecretID"]}) == 3
    assert (await get(world, "/v1/agent/connect/ca/leaf/web", named["SecretID"])).status == 200
    missing = await put(world, f"/v1/acl/token/{UUID}/clone", {})
    assert (missing.status, missing.text) == (403, "ACL not found")


async def test_the_anonymous_token_may_be_given_policies(world: World) -> None:
    await put(world, "/v1/acl/policy", {"Name": "look", "Rules": 'operator = "read"'})

    assert (await get(world, "/v1/operator/raft/configuration", "")).status == 403
    changed = await put(world, f"/v1/acl/token/{ANONYMOUS_ID}", {"Policies": [{"Name": "look"}]})
    assert changed.status == 200, changed.text
    assert (await get(world, "/v1/operator/raft/configuration", "")).status == 200


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"AccessorID": "x"}, "Invalid Token: AccessorID is not a valid UUID"),
        ({"SecretID": "x"}, "Invalid Token: SecretID is not a valid UUID"),
        ({"SecretID": MASTER}, "Invalid Token: SecretID is already in use"),
        ({"AccessorID": MASTER}, "Invalid Token: AccessorID is already in use"),
        ({"AccessorID": ANONYMOUS_ID}, "Invalid Token: AccessorID is already in use"),
        (
            {"SecretID": "00000000-0000-0000-0000-000000000009"},
            'Invalid Token: UUIDs with the prefix "00000000-0000-0000-0000-0000000000" are reserved',
        ),
        ({"Policies": [{"Name": "none"}]}, 'No such ACL policy with name "none"'),
        ({"Policies": [{"ID": UUID}]}, f'No such ACL policy with ID "{UUID}"'),
        ({"ExpirationTTL": "-1m"}, "Token Expiration TTL '-1m0s' should be > 0"),
        ({"ExpirationTTL": "1s"}, "ExpirationTime cannot be less than 1m0s in the future (was 1s)"),
        ({"ExpirationTTL": "25h"}, "ExpirationTime cannot be more than 24h0m0s in the future (was 25h0m0s)"),
        ({"ExpirationTTL": 1000}, "ExpirationTime cannot be less than 1m0s in the future (was 0s)"),
        ({"ExpirationTTL": "1x"}, 'Bad request: Token decoding failed: time: unknown unit "x" in duration "1x"'),
        ({"ExpirationTime": "2020-01-01T00:00:00Z"}, "ExpirationTime cannot be before CreateTime"),
        ({"ExpirationTime": "soon"}, 'Bad request: Token decoding failed: ExpirationTime: "soon" is no RFC 3339 time'),
        ({"Roles": [{"Name": "x"}]}, "Roles are not kept here"),
        ({"NodeIdentities": [{"NodeName": "x"}]}, "Node identities are not kept here"),
        ({"Rules": WEB}, "Rules cannot be specified for this token"),
        ({"AuthMethod": "x"}, "AuthMethod field is disallowed outside of Login"),
        ({"ServiceIdentities": [{}]}, "Service identity is missing the service name field on this token"),
        ({"ServiceIdentities": [{"ServiceName": "Web"}]}, 'Service identity "Web" has an invalid name.'),
        (
            {"Local": True, "ServiceIdentities": [{"ServiceName": "web", "Datacenters": ["dc1"]}]},
            'Service identity "web" cannot specify a list of datacenters on a local token',
        ),
        ({"Description": "x" * 1025}, "Description: longer than 1024 characters"),
        ({"Description": 5}, "Bad request: Token decoding failed: json: cannot unmarshal number into Go struct field"),
        ({"Local": "yes"}, "Bad request: Token decoding failed: json: cannot unmarshal string into Go struct field"),
        ({"Policies": ["x"]}, "Bad request: Token decoding failed: json: cannot unmarshal string into Policies"),
        ({"Foo": 1}, 'Bad request: Token decoding failed: json: unknown field "Foo"'),
        ([], "Bad request: Token decoding failed: json: cannot unmarshal array into Go value of type structs.ACLToken"),
    ],
)
async def test_a_token_that_cannot_be_is_refused(world: World, document: object, text: str) -> None:
    index = world.log.state.index

    answer = await put(world, "/v1/acl/token", document)

    assert answer.status == 400
    assert answer.text.startswith(text)
    assert world.log.state.index == index


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({}, "Invalid Policy: no Name is set"),
        ({"Name": "a b"}, "Invalid Policy: invalid Name. Only alphanumeric characters, '-' and '_' are allowed"),
        ({"Name": "global-management"}, 'Invalid Policy: A Policy with Name "global-management" already exists'),
        ({"Name": "x", "ID": UUID}, "Bad request: Cannot specify the ID when creating a new policy"),
        ({"Name": "x", "Rules": "operator = 1"}, "Invalid operator policy: 1"),
        ({"Name": "x", "Rules": "{"}, "Failed to parse ACL rules: "),
        ({"Name": "x", "Datacenters": "dc1"}, "Bad request: Policy decoding failed: json: cannot unmarshal string"),
        ({"Name": "x", "Bar": 1}, 'Bad request: Policy decoding failed: json: unknown field "Bar"'),
    ],
)
async def test_a_policy_that_cannot_be_is_refused(world: World, document: object, text: str) -> None:
    answer = await put(world, "/v1/acl/policy", document)

    assert answer.status == 400
    assert answer.text.startswith(text)


async def test_what_may_not_be_changed_or_deleted_stays(world: World) -> None:
    made = await made_token(world, WEB, ExpirationTTL="1h")
    token = f"/v1/acl/token/{made['AccessorID']}"
    builtin = f"/v1/acl/policy/{MANAGEMENT_ID}"
    own = json.loads((await get(world, "/v1/acl/token/self")).text)["AccessorID"]
    rules = json.loads((await get(world, builtin)).text)["Rules"]
    calls: list[tuple[Any, int, str]] = [
        (await put(world, token, {"SecretID": UUID}), 400, "Changing a tokens SecretID is not permitted"),
        (
            await put(world, token, {"AccessorID": UUID}),
            400,
            "Bad request: Token Accessor ID in URL and payload do not",
        ),
        (await put(world, token, {"Local": True}), 400, f"cannot toggle local mode of {made['AccessorID']}"),
        (await put(world, token, {"ExpirationTTL": "2h"}), 400, "Cannot change expiration time of"),
        (await put(world, f"/v1/acl/token/{OTHER}", {}), 404, f'Cannot find token "{OTHER}"'),
        (await put(world, "/v1/acl/token/x", {}), 400, "AccessorID is not a valid UUID"),
        (await delete(world, f"/v1/acl/token/{ANONYMOUS_ID}"), 400, "Delete operation not permitted on the anonymous"),
        (await delete(world, f"/v1/acl/token/{own}"), 400, "Deletion of the request's authorization token is not"),
        (await delete(world, "/v1/acl/token/x"), 400, "Accessor ID is missing or an invalid UUID"),
        (await delete(world, "/v1/acl/token/"), 400, "Bad request: Missing token ID"),
        (await put(world, builtin, {"Name": "x", "Rules": ""}), 400, "Changing the Rules for the builtin"),
        (
            await put(world, builtin, {"Name": "x", "Rules": rules, "Datacenters": ["dc1"]}),
            400,
            "Changing the Datacenters of the builtin",
        ),
        (await delete(world, builtin), 400, "Delete operation not permitted on the builtin global-management policy"),
        (await put(world, f"/v1/acl/policy/{OTHER}", {"Name": "x"}), 404, f"cannot find policy {OTHER}"),
    ]

    for answer, status, text in calls:
        assert (answer.status, answer.text[: len(text)]) == (status, text)
    renamed = await put(world, builtin, {"Name": "all", "Rules": rules})
    assert json.loads(renamed.text)["Name"] == "all"


async def test_an_expired_token_is_gone_at_once(world: World) -> None:
    token = await made_token(world, WEB, ExpirationTTL="5m")
    leaf = "/v1/agent/connect/ca/leaf/web"

    assert (await get(world, leaf, token["SecretID"])).status == 200
    await world.clock.advance(301)

    for answer in (
        await get(world, leaf, token["SecretID"]),
        await get(world, "/v1/acl/token/self", token["SecretID"]),
        await get(world, f"/v1/acl/token/{token['AccessorID']}"),
    ):
        assert (answer.status, answer.text) == (403, "ACL not found")
    assert token["AccessorID"] not in (await get(world, "/v1/acl/tokens")).text


async def test_a_list_waits_for_a_change(world: World) -> None:
    index = int((await get(world, "/v1/acl/tokens")).headers["X-Consul-Index"])

    waited = await world.fetch("GET", f"/v1/acl/tokens?index={index}&wait=2s", {"X-Consul-Token": MASTER}, advance=4.0)
    await made_token(world, WEB)
    at_once = await get(world, f"/v1/acl/tokens?index={index}")

    assert waited.headers["X-Consul-Index"] == str(index)
    assert int(at_once.headers["X-Consul-Index"]) > index


async def test_bootstrap_makes_one_management_token_and_the_reset_file_one_more() -> None:
    async with guarded(replace(ON, initial_management=None)) as world:
        first = await world.fetch("PUT", "/v1/acl/bootstrap")
        token = json.loads(first.text)
        second = await world.fetch("PUT", "/v1/acl/bootstrap")
        index = world.log.state.acl.bootstrap_index
        reset = world.accesses["n1"].reset
        reset.index = index + 1
        wrong = await world.fetch("PUT", "/v1/acl/bootstrap")
        reset.index = index
        third = await world.fetch("PUT", "/v1/acl/bootstrap")
        fourth = await world.fetch("PUT", "/v1/acl/bootstrap")
        secrets = [token["SecretID"], json.loads(third.text)["SecretID"]]
        listings = [(await get(world, "/v1/acl/tokens", each)).status for each in secrets]

    assert list(token)[:4] == ["ID", "AccessorID", "SecretID", "Description"]
    assert token["ID"] == token["SecretID"]
    assert token["Policies"] == [{"ID": MANAGEMENT_ID, "Name": "global-management"}]
    assert token["Description"] == "Bootstrap Token (Global Management)"
    assert (second.status, second.text) == (
        403,
        f"Permission denied: ACL bootstrap no longer allowed (reset index: {index})",
    )
    assert (wrong.status, wrong.text) == (
        400,
        f"Invalid bootstrap reset index (specified {index + 1}, reset index: {index})",
    )
    assert (third.status, fourth.status, reset.removed) == (200, 403, 1)
    assert listings == [200, 200]


async def test_without_acls_there_is_no_such_thing() -> None:
    async with running() as world:
        answers = [
            await world.fetch("PUT", "/v1/acl/bootstrap"),
            await get(world, "/v1/acl/tokens"),
            await get(world, "/v1/acl/token/self"),
            await put(world, "/v1/acl/policy", {"Name": "x"}),
        ]

    assert {(each.status, each.text) for each in answers} == {(401, "ACL support disabled")}


async def test_a_default_of_allow_allows_all_but_management() -> None:
    async with guarded(replace(ON, default_allow=True)) as world:
        leaf = await get(world, "/v1/agent/connect/ca/leaf/web", "")
        configuration = await get(world, CONFIGURATION, "")
        tokens = await get(world, "/v1/acl/tokens", "")
        snapshot = await get(world, "/v1/snapshot", "")
        unknown = await get(world, CONFIGURATION, UNKNOWN)

    assert (leaf.status, configuration.status, tokens.status, snapshot.status) == (200, 200, 403, 403)
    assert (unknown.status, unknown.text) == (403, "ACL not found")


async def test_each_csr_of_a_list_is_decided_by_itself(world: World) -> None:
    token = await made_token(world, WEB)
    csrs = [csr_for(name, trust_domain=f"{CLUSTER_ID}.consul") for name in ("web", "db")]

    answer = await put(world, "/v1/connect/ca/sign", {"CSRs": csrs}, token=token["SecretID"])
    web, db = json.loads(answer.text)
    alone = await put(world, "/v1/connect/ca/sign", {"CSR": csrs[1]}, token=token["SecretID"])

    assert web["Service"] == "web"
    assert db == {"Error": "Permission denied", "Status": 403}
    assert (alone.status, alone.text) == (403, "Permission denied")


async def test_who_is_denied_takes_no_place_in_the_rate_of_signing() -> None:
    async with guarded(config={"CSRMaxPerSecond": 1}) as world:
        denied = [(await get(world, f"/v1/agent/connect/ca/leaf/s{number}", "")).status for number in range(5)]
        allowed = await get(world, "/v1/agent/connect/ca/leaf/web")

    assert denied == [403] * 5
    assert allowed.status == 200


async def test_a_follower_without_a_leader_trusts_its_copy_or_refuses_as_it_is_told() -> None:
    for down_deny, status in ((False, 200), (True, 403)):
        async with guarded(replace(ON, down_deny=down_deny), dev=False, node="n1", leader="n2") as world:
            before = await get(world, "/v1/agent/connect/ca/leaf/web")
            world.log.step_down()
            cached = await get(world, "/v1/agent/connect/ca/leaf/web")
            roots = await get(world, "/v1/agent/connect/ca/roots", "")

        assert before.status == 200
        assert cached.status == status, cached.text
        assert roots.status == 200


async def test_a_follower_forwards_the_token_and_the_leader_decides() -> None:
    async with guarded(dev=False, node="n1", leader="n2") as world:
        token = await made_token(world, WEB)
        signed = await get(world, "/v1/agent/connect/ca/leaf/web", token["SecretID"])
        other = await get(world, "/v1/agent/connect/ca/leaf/db", token["SecretID"])
        servers = await get(world, "/v1/operator/raft/configuration", token["SecretID"])
        configured = await put(world, CONFIGURATION, {"Provider": "consul", "Config": {}}, token=token["SecretID"])

    assert signed.status == 200
    assert {(each.status, each.text) for each in (other, servers, configured)} == {(403, "Permission denied")}


async def test_no_log_line_holds_a_secret(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    token = await made_token(world, WEB)
    secret = token["SecretID"]
    for path in ("/v1/acl/tokens", CONFIGURATION, "/v1/agent/connect/ca/leaf/db", "/v1/agent/metrics"):
        assert (await get(world, path, secret)).status == 403
        assert (await world.fetch("GET", f"{path}?token={secret}")).status == 403
        assert (await world.fetch("GET", path, {"Authorization": f"Bearer {secret}"})).status == 403
    await put(world, "/v1/acl/token", {"SecretID": secret})
    await get(world, CONFIGURATION, UNKNOWN)
    await delete(world, f"/v1/acl/token/{token['AccessorID']}")
    printed = "".join(capsys.readouterr())

    assert "access denied" in printed
    assert token["AccessorID"] in printed
    for each in (secret, MASTER, UNKNOWN):
        assert each not in printed


WRITES = [
    ("PUT", "/v1/acl/token"),
    ("PUT", f"/v1/acl/token/{UUID}"),
    ("PUT", f"/v1/acl/token/{UUID}/clone"),
    ("DELETE", f"/v1/acl/token/{UUID}"),
    ("PUT", "/v1/acl/policy"),
    ("PUT", f"/v1/acl/policy/{UUID}"),
    ("DELETE", f"/v1/acl/policy/{UUID}"),
]
READS = [
    ("GET", f"/v1/acl/{path}") for path in ("tokens", "token/self", "token/", "policies", "policy/", "policy/name/")
]


@pytest.mark.parametrize(("method", "path"), [*WRITES, *READS])
async def test_what_is_meant_for_a_namespace_does_not_count_for_all(world: World, method: str, path: str) -> None:
    before = world.log.state
    by_name = await world.fetch(method, path + "?ns=team", {"X-Consul-Token": MASTER}, body=b"{}")
    by_header = await world.fetch(method, path, {"X-Consul-Token": MASTER, "X-Consul-Namespace": "team"}, body=b"{}")

    assert (by_name.status, by_header.status) == (400, 400)
    assert by_name.text.endswith('"ns" - Namespaces are a Consul Enterprise feature')
    assert by_header.text.endswith('"X-Consul-Namespace" - Namespaces are a Consul Enterprise feature')
    assert world.log.state is before


@pytest.mark.parametrize(("method", "path"), [*WRITES, *READS, ("PUT", "/v1/acl/bootstrap")])
async def test_without_acls_nothing_else_is_said(method: str, path: str) -> None:
    async with running(dev=False) as off:
        answered = await off.fetch(method, path, body=b"{" if method == "PUT" else b"")

    assert (answered.status, answered.text) == (401, "ACL support disabled")
