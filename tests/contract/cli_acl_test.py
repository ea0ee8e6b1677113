from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from caserver.cli import main
from tests.testkit.scripted import Scripted, scripted_server

ACCESSOR = "b6b856da-5193-4e78-845a-7d61ca8371ba"
POLICY = "c01a1f82-44be-41b0-a686-685fb6e0f485"
TOKEN = {
    "AccessorID": ACCESSOR,
    "SecretID": "00a3d4e5-0000-4000-8000-000000000001",
    "Description": "web",
    "Policies": [{"ID": POLICY, "Name": "web"}],
    "ServiceIdentities": [{"ServiceName": "db"}, {"ServiceName": "api", "Datacenters": ["dc1", "dc2"]}],
    "Local": False,
    "ExpirationTime": "2026-11-23T12:25:49Z",
    "CreateTime": "2026-11-23T11:25:49Z",
    "Hash": "q80=",
    "CreateIndex": 5,
    "ModifyIndex": 6,
}
PRETTY_TOKEN = f"""AccessorID:       {ACCESSOR}
SecretID:         00a3d4e5-0000-4000-8000-000000000001
Description:      web
Local:            false
Create Time:      2026-11-23 11:25:49 +0000 UTC
Expiration Time:  2026-11-23 12:25:49 +0000 UTC
Policies:
   {POLICY} - web
Service Identities:
   db (Datacenters: all)
   api (Datacenters: dc1, dc2)

"""
POLICY_DOCUMENT = {
    "ID": POLICY,
    "Name": "web",
    "Description": "",
    "Rules": 'service "web" { policy = "write" }',
    "Hash": "q80=",
    "CreateIndex": 3,
    "ModifyIndex": 4,
}
PRETTY_POLICY = f"""ID:           {POLICY}
Name:         web
Description:  
Datacenters:  
Rules:
service "web" {{ policy = "write" }}
"""  # noqa: W291 - Consul's layout


class Session:
    """A command against a server that answers what it is told to."""

    def __init__(self, server: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
        self.server = server
        self._capsys = capsys

    def run(self, *words: str, answers: tuple[object, ...] = (), environ: dict[str, str] | None = None) -> int:
        self.server.answers_in_turn(*map(json.dumps, answers))
        self.code = main(["acl", *words, f"-http-addr={self.server.address}"], environ or {})
        self.out, self.err = self._capsys.readouterr()
        return self.code

    def sent(self, number: int = -1) -> Any:
        return json.loads(self.server.asked[number].body)

    @property
    def targets(self) -> list[str]:
        return [f"{each.method} {each.target}" for each in self.server.asked]


@pytest.fixture
def session(capsys: pytest.CaptureFixture[str]) -> Any:
    with scripted_server() as server:
        yield Session(server, capsys)


def test_bootstrap_shows_the_token_in_consuls_layout(session: Session) -> None:
    assert session.run("bootstrap", answers=(TOKEN,)) == 0
    assert session.out == PRETTY_TOKEN
    assert session.targets == ["PUT /v1/acl/bootstrap"]


def test_a_refused_bootstrap_is_told_in_consuls_words(session: Session) -> None:
    session.server.answers("Permission denied: ACL bootstrap no longer allowed (reset index: 13)", 403)

    assert session.run("bootstrap") == 1
    assert session.err == (
        "Failed ACL bootstrapping: Unexpected response code: 403 "
        "(Permission denied: ACL bootstrap no longer allowed (reset index: 13))\n"
    )


def test_a_token_is_made_of_policies_and_identities(session: Session) -> None:
    code = session.run(
        "token",
        "create",
        "-description=web",
        "-policy-name=web",
        f"-policy-id={POLICY}",
        "-service-identity=db",
        "-service-identity=api:dc1,dc2",
        "-expires-ttl=1h",
        "-token=secret",
        answers=(TOKEN,),
    )

    assert (code, session.out) == (0, PRETTY_TOKEN)
    assert session.sent() == {
        "AccessorID": "",
        "SecretID": "",
        "Description": "web",
        "Local": False,
        "Policies": [{"Name": "web"}, {"ID": POLICY}],
        "ServiceIdentities": [{"ServiceName": "db"}, {"ServiceName": "api", "Datacenters": ["dc1", "dc2"]}],
        "ExpirationTTL": "1h",
    }
    assert session.server.asked[0].headers["X-Consul-Token"] == "secret"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("token", "create"), "Cannot create a token without specifying -policy-name"),
        (("token", "read"), "Must specify the -id parameter"),
        (("token", "delete"), "Must specify the -id parameter"),
        (("token", "update"), "Cannot update a token without specifying the -id parameter"),
        (("token", "clone"), "Cannot clone a token without specifying the -id parameter"),
        (("token", "create", "-service-identity=x:"), "Malformed -service-identity argument"),
        (("policy", "create"), "Missing require '-name' flag"),
        (("policy", "create", "-name=x", "-rules=@/nowhere"), "Error loading rules: Failed to read file:"),
        (("policy", "read"), "Must specify either the -id or -name parameters"),
        (("policy", "delete"), "Must specify either the -id or -name parameters"),
        (("token", "list", "-format=xml"), 'invalid value "xml" for -format'),
    ],
)
def test_what_is_missing_is_told_before_anything_is_asked(session: Session, words: tuple[str, ...], text: str) -> None:
    assert session.run(*words) == 1
    assert session.err.startswith(text)
    assert session.targets == []


def test_the_beginning_of_an_id_will_do_if_it_is_the_only_one(session: Session) -> None:
    session.run("token", "read", "-id=b6b8", answers=([{"AccessorID": ACCESSOR}, {"AccessorID": "x"}], TOKEN))

    assert session.out == PRETTY_TOKEN
    assert session.targets == ["GET /v1/acl/tokens", f"GET /v1/acl/token/{ACCESSOR}"]


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ([], "Error determining token ID: No such token ID with prefix: b6"),
        (["b6-1", "b6-2"], "Error determining token ID: Partial token ID is not unique"),
    ],
)
def test_other_beginnings_are_refused(session: Session, known: list[str], text: str) -> None:
    assert session.run("token", "delete", "-id=b6", answers=([{"AccessorID": each} for each in known],)) == 1
    assert session.err == text + "\n"


def test_an_update_keeps_what_is_not_given(session: Session) -> None:
    current = {**TOKEN, "SecretID": "<hidden>"}

    session.run("token", "update", f"-id={ACCESSOR}", "-append-policy-name=more", answers=(current, TOKEN))

    assert session.out == "Token updated successfully.\n" + PRETTY_TOKEN
    assert session.sent()["Policies"] == [*TOKEN["Policies"], {"Name": "more"}]  # type: ignore[misc]
    assert session.sent()["ServiceIdentities"] == TOKEN["ServiceIdentities"]
    assert session.sent()["Description"] == "web"


def test_an_update_replaces_what_is_given(session: Session) -> None:
    session.run(
        "token",
        "update",
        f"-accessor-id={ACCESSOR}",
        "-policy-name=other",
        "-service-identity=x",
        "-description=new",
        answers=(TOKEN, TOKEN),
    )

    assert session.sent()["Policies"] == [{"Name": "other"}]
    assert session.sent()["ServiceIdentities"] == [{"ServiceName": "x"}]
    assert session.sent()["Description"] == "new"


def test_a_token_is_cloned_and_deleted(session: Session) -> None:
    session.run("token", "clone", f"-id={ACCESSOR}", "-description=copy", answers=(TOKEN,))
    assert session.out == "Token cloned successfully.\n" + PRETTY_TOKEN
    assert session.sent() == {"Description": "copy"}

    session.run("token", "delete", f"-id={ACCESSOR}", answers=(True,))
    assert session.out == f'Token "{ACCESSOR}" deleted successfully\n'
    assert session.targets == [f"PUT /v1/acl/token/{ACCESSOR}/clone", f"DELETE /v1/acl/token/{ACCESSOR}"]


def test_tokens_are_listed_without_secrets(session: Session) -> None:
    stub = {key: value for key, value in TOKEN.items() if key != "SecretID"}

    session.run("token", "list", "-meta", answers=([stub, stub],))

    assert session.out.count("AccessorID:") == 2
    assert "SecretID" not in session.out
    assert "Hash:             abcd\nCreate Index:     5\nModify Index:     6\n" in session.out


def test_the_own_token_is_read_with_self_as_json(session: Session) -> None:
    session.run("token", "read", "-self", "-format=json", answers=(TOKEN,), environ={"CONSUL_HTTP_TOKEN": "mine"})

    assert json.loads(session.out) == TOKEN
    assert session.targets == ["GET /v1/acl/token/self"]
    assert session.server.asked[0].headers["X-Consul-Token"] == "mine"


def test_the_token_may_come_from_a_file(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")

    session.run("policy", "list", f"-token-file={file}", answers=([],))

    assert session.server.asked[0].headers["X-Consul-Token"] == "from-file"


def test_a_policy_is_made_with_rules_from_a_file_or_standard_input(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "web.hcl"
    file.write_text('operator = "read"\n')

    session.run("policy", "create", "-name=web", f"-rules=@{file}", answers=(POLICY_DOCUMENT,))
    assert session.out == PRETTY_POLICY
    assert session.sent() == {"Name": "web", "Description": "", "Rules": 'operator = "read"\n', "Datacenters": None}

    monkeypatch.setattr("sys.stdin", io.StringIO('acl = "read"'))
    session.run("policy", "create", "-name=web", "-rules=-", "-valid-datacenter=dc1", answers=(POLICY_DOCUMENT,))
    assert session.sent() == {"Name": "web", "Description": "", "Rules": 'acl = "read"', "Datacenters": ["dc1"]}


def test_a_policy_is_read_by_its_name(session: Session) -> None:
    listed = [{"ID": "x", "Name": "other"}, {"ID": POLICY, "Name": "web"}]

    session.run("policy", "read", "-name=web", "-meta", answers=(listed, POLICY_DOCUMENT))

    assert session.targets == ["GET /v1/acl/policies", f"GET /v1/acl/policy/{POLICY}"]
    assert "Hash:         abcd\nCreate Index: 3\nModify Index: 4\n" in session.out
    assert session.run("policy", "read", "-name=nobody", answers=(listed,)) == 1
    assert session.err == "Error determining policy ID: No such policy with name nobody\n"


def test_a_policy_update_merges_unless_told_otherwise(session: Session) -> None:
    session.run("policy", "update", f"-id={POLICY}", "-description=new", answers=(POLICY_DOCUMENT, POLICY_DOCUMENT))
    assert session.out == "Policy updated successfully\n" + PRETTY_POLICY
    assert session.sent() == {
        "ID": POLICY,
        "Name": "web",
        "Description": "new",
        "Rules": POLICY_DOCUMENT["Rules"],
        "Datacenters": None,
    }

    session.run("policy", "update", f"-id={POLICY}", "-name=n", "-no-merge", answers=(POLICY_DOCUMENT,))
    assert session.sent() == {"ID": POLICY, "Name": "n", "Description": None, "Rules": None, "Datacenters": None}


def test_policies_are_listed_and_deleted(session: Session) -> None:
    session.run("policy", "list", answers=([{**POLICY_DOCUMENT, "Datacenters": ["dc1"]}],))
    assert session.out == f"web:\n   ID:           {POLICY}\n   Description:  \n   Datacenters:  dc1\n"

    session.run("policy", "delete", f"-id={POLICY}", answers=(True,))
    assert session.out == f'Policy "{POLICY}" deleted successfully\n'
