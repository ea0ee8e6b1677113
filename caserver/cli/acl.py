"""``caserver acl``: tokens and policies, in Consul's flags, words and layout."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from caserver.cli.flags import HTTP_GROUP, Command, Flag, Parsed, Takes, client, query
from caserver.cli.output import chosen_format, complain, failed, format_flag, say
from caserver.client import Client, ClientError

_FORMATS = ("pretty", "json")
_UUID_LENGTH = 36
Document = dict[str, Any]


class _Failed(Exception):
    """What a command could not do, in Consul's words."""

    def __init__(self, what: str, cause: ClientError | None = None) -> None:
        super().__init__(what)
        self.cause = cause


class _Session:
    """One command's view of the API."""

    def __init__(self, parsed: Parsed, environ: Mapping[str, str]) -> None:
        self.layout = chosen_format(parsed.values.get("format"), *_FORMATS)
        self.parsed = parsed
        self._client: Client = client(parsed, environ)
        self._query = query(parsed)

    def value(self, *names: str) -> str:
        """The first of these flags that was given; empty if none was."""
        return next((self.parsed.values[name] for name in names if self.parsed.values.get(name)), "")

    def values(self, name: str) -> list[str]:
        """What a flag that may be given several times holds."""
        return list(self.parsed.lists.get(name, ()))

    def call(self, failure: str, method: str, *path: str, document: Document | None = None) -> Any:
        """One call below /v1/acl; _Failed with ``failure`` in front if it did not succeed."""
        target = "/".join(("/v1/acl", *(quote(each, safe="") for each in path)))
        body = json.dumps(document).encode() if document is not None else b"" if method != "GET" else None
        asked = self._query if method == "GET" else {key: each for key, each in self._query.items() if key != "stale"}
        try:
            return self._client.call(method, target, query=asked, body=body).json()
        except ClientError as exc:
            raise _Failed(failure, exc) from exc

    def full_id(self, failure: str, kind: str, given: str) -> str:
        """The id of which ``given`` is the beginning; the only one."""
        if len(given) == _UUID_LENGTH:
            return given
        name, path = ("AccessorID", "tokens") if kind == "token" else ("ID", "policies")
        known = [str(each.get(name, "")) for each in self.call(failure, "GET", path)]
        found = [each for each in known if each.startswith(given)]
        if not found:
            raise _Failed(f"{failure}: No such {kind} ID with prefix: {given}")
        if len(found) > 1:
            raise _Failed(f"{failure}: Partial {kind} ID is not unique")
        return found[0]

    def policy_id(self, failure: str) -> str:
        """The policy that -id or -name stand for."""
        if given := self.value("id"):
            return self.full_id(failure, "policy", given)
        name = self.value("name")
        if not name:
            raise _Failed("Must specify either the -id or -name parameters")
        for each in self.call(failure, "GET", "policies"):
            if each.get("Name") == name:
                return str(each.get("ID", ""))
        raise _Failed(f"{failure}: No such policy with name {name}")

    def show(self, document: Any, pretty: Callable[[Any, bool], str]) -> None:
        """Print a document in the layout that was asked for."""
        if self.layout == "json":
            say(json.dumps(document, indent=4, ensure_ascii=False))
        else:
            say(pretty(document, self.parsed.switch("meta")) + "\n")


def _running(work: Callable[[_Session], None]) -> Callable[[Parsed, Mapping[str, str]], int]:
    def run(parsed: Parsed, environ: Mapping[str, str]) -> int:
        try:
            work(_Session(parsed, environ))
        except _Failed as exc:
            if exc.cause is not None:
                return failed(str(exc), exc.cause)
            complain(str(exc))
            return 1
        return 0

    return run


# Layout ---------------------------------------------------------------------------------------------------------------


def _pretty_token(token: Document, meta: bool) -> str:  # noqa: FBT001 - one signature for all layouts
    rows = [
        ("AccessorID", token.get("AccessorID", "")),
        ("SecretID", token.get("SecretID", "")),
        ("Description", token.get("Description", "")),
        ("Local", _truth(token.get("Local"))),
        ("Create Time", _go_time(token.get("CreateTime", ""))),
    ]
    if "SecretID" not in token:
        del rows[1]
    if token.get("ExpirationTime"):
        rows.append(("Expiration Time", _go_time(token["ExpirationTime"])))
    rows += _metadata(token) if meta else []
    lines = [f"{name + ':':<18}{value}" for name, value in rows]
    if token.get("Policies"):
        lines.append("Policies:")
        lines += [f"   {each.get('ID', '')} - {each.get('Name', '')}" for each in token["Policies"]]
    if token.get("ServiceIdentities"):
        lines.append("Service Identities:")
        lines += [
            f"   {each.get('ServiceName', '')} (Datacenters: {', '.join(each.get('Datacenters') or ()) or 'all'})"
            for each in token["ServiceIdentities"]
        ]
    return "".join(f"{line}\n" for line in lines)


def _pretty_tokens(tokens: Iterable[Document], meta: bool) -> str:  # noqa: FBT001
    return "\n".join(_pretty_token(each, meta) for each in tokens)


def _pretty_policy(policy: Document, meta: bool) -> str:  # noqa: FBT001
    rows = [
        ("ID", policy.get("ID", "")),
        ("Name", policy.get("Name", "")),
        ("Description", policy.get("Description", "")),
        ("Datacenters", ", ".join(policy.get("Datacenters") or ())),
        *(_metadata(policy) if meta else []),
    ]
    return "".join(f"{name + ':':<14}{value}\n" for name, value in rows) + f"Rules:\n{policy.get('Rules', '')}"


def _pretty_policies(policies: Iterable[Document], meta: bool) -> str:  # noqa: FBT001
    lines = []
    for each in policies:
        rows = [
            ("ID", each.get("ID", "")),
            ("Description", each.get("Description", "")),
            ("Datacenters", ", ".join(each.get("Datacenters") or ())),
            *(_metadata(each) if meta else []),
        ]
        lines += [f"{each.get('Name', '')}:", *(f"   {name + ':':<14}{value}" for name, value in rows)]
    return "\n".join(lines)


def _metadata(document: Document) -> list[tuple[str, str]]:
    digest = base64.b64decode(document.get("Hash") or "").hex()
    return [
        ("Hash", digest),
        ("Create Index", str(document.get("CreateIndex", 0))),
        ("Modify Index", str(document.get("ModifyIndex", 0))),
    ]


def _truth(value: object) -> str:
    return "true" if value else "false"


def _go_time(text: str) -> str:
    """An instant as Go prints it."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M:%S} +0000 UTC"
    except ValueError:
        return text


# Tokens ---------------------------------------------------------------------------------------------------------------


def _bootstrap(session: _Session) -> None:
    session.show(session.call("Failed ACL bootstrapping", "PUT", "bootstrap"), _pretty_token)


def _create_token(session: _Session) -> None:
    links = _policies(session, "policy-name", "policy-id")
    identities = [_identity(each) for each in session.values("service-identity")]
    if not links and not identities:
        raise _Failed(
            "Cannot create a token without specifying -policy-name, -policy-id, or -service-identity at least once"
        )
    document: Document = {
        "AccessorID": session.value("accessor"),
        "SecretID": session.value("secret"),
        "Description": session.value("description"),
        "Local": session.parsed.switch("local"),
        "Policies": links,
        "ServiceIdentities": identities,
    }
    if lifetime := session.value("expires-ttl"):
        document["ExpirationTTL"] = lifetime
    session.show(session.call("Failed to create new token", "PUT", "token", document=document), _pretty_token)


def _read_token(session: _Session) -> None:
    if session.parsed.switch("self"):
        session.show(session.call("Error reading token", "GET", "token", "self"), _pretty_token)
        return
    given = session.value("id", "accessor-id")
    if not given:
        raise _Failed("Must specify the -id parameter")
    accessor_id = session.full_id("Error determining token ID", "token", given)
    session.show(session.call(f'Error reading token "{accessor_id}"', "GET", "token", accessor_id), _pretty_token)


def _update_token(session: _Session) -> None:
    given = session.value("id", "accessor-id")
    if not given:
        raise _Failed("Cannot update a token without specifying the -id parameter")
    accessor_id = session.full_id("Error determining token ID", "token", given)
    token: Document = session.call("Error when retrieving current token", "GET", "token", accessor_id)
    if description := session.value("description"):
        token["Description"] = description
    known = token.get("Policies") or []
    links = _policies(session, "policy-name", "policy-id")
    appended = _policies(session, "append-policy-name", "append-policy-id")
    if links and appended:
        raise _Failed("Cannot combine the use of policy-id/policy-name flags with append- variants.")
    keeps = appended or not links or session.parsed.switch("merge-policies")
    token["Policies"] = [*(known if keeps else []), *links, *appended]
    token["ServiceIdentities"] = _updated_identities(session, token.get("ServiceIdentities") or [])
    changed = session.call(f"Failed to update token {accessor_id}", "PUT", "token", accessor_id, document=token)
    if session.layout == "pretty":
        say("Token updated successfully.")
    session.show(changed, _pretty_token)


def _updated_identities(session: _Session, known: list[Document]) -> list[Document]:
    given = [_identity(each) for each in session.values("service-identity")]
    appended = [_identity(each) for each in session.values("append-service-identity")]
    if given and not session.parsed.switch("merge-service-identities") and not appended:
        return given
    named = {each["ServiceName"]: each for each in (*known, *given, *appended)}
    return list(named.values())


def _clone_token(session: _Session) -> None:
    given = session.value("id", "accessor-id")
    if not given:
        raise _Failed("Cannot clone a token without specifying the -id parameter")
    accessor_id = session.full_id("Error determining token ID", "token", given)
    document = {"Description": session.value("description")}
    token = session.call("Failed to clone token", "PUT", "token", accessor_id, "clone", document=document)
    if session.layout == "pretty":
        say("Token cloned successfully.")
    session.show(token, _pretty_token)


def _delete_token(session: _Session) -> None:
    given = session.value("id", "accessor-id")
    if not given:
        raise _Failed("Must specify the -id parameter")
    accessor_id = session.full_id("Error determining token ID", "token", given)
    session.call(f'Error deleting token "{accessor_id}"', "DELETE", "token", accessor_id)
    say(f'Token "{accessor_id}" deleted successfully')


def _list_tokens(session: _Session) -> None:
    session.show(session.call("Failed to retrieve the token list", "GET", "tokens"), _pretty_tokens)


def _policies(session: _Session, names: str, ids: str) -> list[Document]:
    named: list[Document] = [{"Name": each} for each in session.values(names)]
    failure = "Error resolving policy ID"
    return named + [{"ID": session.full_id(f"{failure} {each}", "policy", each)} for each in session.values(ids)]


def _identity(text: str) -> Document:
    """``SERVICENAME`` or ``SERVICENAME:DATACENTER1,DATACENTER2``."""
    name, colon, datacenters = text.partition(":")
    if not name or (colon and not datacenters):
        raise _Failed("Malformed -service-identity argument: expected SERVICENAME or SERVICENAME:DATACENTER1,...")
    return {"ServiceName": name} | ({"Datacenters": datacenters.split(",")} if colon else {})


# Policies -------------------------------------------------------------------------------------------------------------


def _create_policy(session: _Session) -> None:
    name = session.value("name")
    if not name:
        raise _Failed("Missing require '-name' flag")
    document: Document = {
        "Name": name,
        "Description": session.value("description"),
        "Rules": _rules(session.value("rules")),
        "Datacenters": session.values("valid-datacenter") or None,
    }
    session.show(session.call("Failed to create new policy", "PUT", "policy", document=document), _pretty_policy)


def _read_policy(session: _Session) -> None:
    policy_id = session.policy_id("Error determining policy ID")
    session.show(session.call(f'Error reading policy "{policy_id}"', "GET", "policy", policy_id), _pretty_policy)


def _update_policy(session: _Session) -> None:
    policy_id = session.policy_id("Error determining policy ID")
    given = {
        "Name": session.parsed.values.get("name"),
        "Description": session.parsed.values.get("description"),
        "Rules": _rules(session.parsed.values["rules"]) if "rules" in session.parsed.values else None,
        "Datacenters": session.values("valid-datacenter") or None,
    }
    policy: Document = {}
    if not session.parsed.switch("no-merge"):
        policy = session.call(f'Error reading policy "{policy_id}"', "GET", "policy", policy_id)
    document = {"ID": policy_id} | {name: policy.get(name) if value is None else value for name, value in given.items()}
    changed = session.call(f'Error updating policy "{policy_id}"', "PUT", "policy", policy_id, document=document)
    if session.layout == "pretty":
        say("Policy updated successfully")
    session.show(changed, _pretty_policy)


def _delete_policy(session: _Session) -> None:
    policy_id = session.policy_id("Error determining policy ID")
    session.call(f'Error deleting policy "{policy_id}"', "DELETE", "policy", policy_id)
    say(f'Policy "{policy_id}" deleted successfully')


def _list_policies(session: _Session) -> None:
    session.show(session.call("Failed to retrieve the policy list", "GET", "policies"), _pretty_policies)


def _rules(given: str) -> str:
    """Rules as given, from a file (``@FILE``) or from standard input (``-``)."""
    if given == "-":
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise _Failed(f"Error loading rules: Failed to read file: {exc}") from exc


# The verbs ------------------------------------------------------------------------------------------------------------

_FORMAT = format_flag(*_FORMATS)
_META = Flag("meta", "Show the content hash and the indexes, too.", takes=Takes.NOTHING)
_TOKEN_ID = Flag("id", "Accessor ID of the token; the beginning of one will do if no other begins so.")
_ACCESSOR_ID = Flag("accessor-id", "The same under its later name.")
_POLICY_ID = Flag("id", "ID of the policy; the beginning of one will do if no other begins so.")
_DESCRIPTION = Flag("description", "What it is for.")
_POLICY_IDS = Flag("policy-id", "ID of a policy that the token shall have. May be given several times.", Takes.VALUES)
_POLICY_NAMES = Flag("policy-name", "Name of such a policy. May be given several times.", Takes.VALUES)
_IDENTITIES = Flag(
    "service-identity",
    "A service that the token stands for: SERVICENAME or SERVICENAME:DATACENTER1,DATACENTER2. May be given several times.",
    Takes.VALUES,
)
_RULES = Flag("rules", "The rules; @FILE reads them from a file, - from standard input.")
_DATACENTERS = Flag(
    "valid-datacenter", "Datacenter in which the policy counts. May be given several times.", Takes.VALUES
)


def _command(
    words: str, description: str, example: str, work: Callable[[_Session], None], *flags: Flag
) -> tuple[str, Command]:
    command = Command(
        words=words,
        usage="[options]",
        description=description,
        example=example,
        flags=(HTTP_GROUP, ("Command Options", flags)),
        run=_running(work),
    )
    return words, command


COMMANDS = dict(
    (
        _command(
            "acl bootstrap",
            "Makes the first management token of the cluster, and shows its secret: it is shown nowhere else.",
            "caserver acl bootstrap",
            _bootstrap,
            _FORMAT,
            _META,
        ),
        _command(
            "acl policy create",
            "Makes a policy.",
            'caserver acl policy create -name=web -rules=\'service "web" { policy = "write" }\'',
            _create_policy,
            Flag("name", "Name of the policy."),
            _DESCRIPTION,
            _RULES,
            _DATACENTERS,
            _FORMAT,
            _META,
        ),
        _command(
            "acl policy delete",
            "Forgets a policy; the tokens that have it lose it.",
            "caserver acl policy delete -name=web",
            _delete_policy,
            _POLICY_ID,
            Flag("name", "Name of the policy."),
        ),
        _command(
            "acl policy list",
            "Lists the policies.",
            "caserver acl policy list",
            _list_policies,
            _FORMAT,
            _META,
        ),
        _command(
            "acl policy read",
            "Displays a policy with its rules.",
            "caserver acl policy read -name=global-management",
            _read_policy,
            _POLICY_ID,
            Flag("name", "Name of the policy."),
            _FORMAT,
            _META,
        ),
        _command(
            "acl policy update",
            "Changes a policy; what is not given stays as it is.",
            "caserver acl policy update -name=web -rules=@web.hcl",
            _update_policy,
            _POLICY_ID,
            Flag("name", "Its new name, or without -id its name."),
            _DESCRIPTION,
            _RULES,
            _DATACENTERS,
            Flag("no-merge", "What is not given becomes empty.", takes=Takes.NOTHING),
            _FORMAT,
            _META,
        ),
        _command(
            "acl token clone",
            "Makes a token that stands for what another one does.",
            "caserver acl token clone -id=b6b85",
            _clone_token,
            _TOKEN_ID,
            _ACCESSOR_ID,
            _DESCRIPTION,
            _FORMAT,
            _META,
        ),
        _command(
            "acl token create",
            "Makes a token, and shows its secret: it is shown nowhere else.",
            "caserver acl token create -description=web -policy-name=web",
            _create_token,
            Flag("accessor", "Accessor ID that it shall have, a UUID."),
            Flag("secret", "Secret ID that it shall have, a UUID; others can see it in the process list."),
            _DESCRIPTION,
            _POLICY_IDS,
            _POLICY_NAMES,
            _IDENTITIES,
            Flag("expires-ttl", "For how long it shall count, 1m to 24h."),
            Flag("local", "Marks it as a token of this datacenter.", takes=Takes.NOTHING),
            _FORMAT,
            _META,
        ),
        _command(
            "acl token delete",
            "Forgets a token.",
            "caserver acl token delete -id=b6b85",
            _delete_token,
            _TOKEN_ID,
            _ACCESSOR_ID,
        ),
        _command(
            "acl token list",
            "Lists the tokens, without their secrets.",
            "caserver acl token list",
            _list_tokens,
            _FORMAT,
            _META,
        ),
        _command(
            "acl token read",
            "Displays a token, without its secret.",
            "caserver acl token read -self",
            _read_token,
            _TOKEN_ID,
            _ACCESSOR_ID,
            Flag("self", "The token that the command shows.", takes=Takes.NOTHING),
            _FORMAT,
            _META,
        ),
        _command(
            "acl token update",
            "Changes what a token stands for; what is not given stays as it is.",
            "caserver acl token update -id=b6b85 -append-policy-name=db",
            _update_token,
            _TOKEN_ID,
            _ACCESSOR_ID,
            _DESCRIPTION,
            _POLICY_IDS,
            _POLICY_NAMES,
            Flag("append-policy-id", "ID of a policy that it shall have, too.", Takes.VALUES),
            Flag("append-policy-name", "Name of such a policy.", Takes.VALUES),
            Flag("merge-policies", "Keep the policies that it has beside those given.", takes=Takes.NOTHING),
            _IDENTITIES,
            Flag("append-service-identity", "A service that it shall stand for, too.", Takes.VALUES),
            Flag("merge-service-identities", "Keep those that it has beside those given.", takes=Takes.NOTHING),
            _FORMAT,
            _META,
        ),
    )
)
