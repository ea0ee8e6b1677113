"""``caserver operator``: the servers behind the CA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from caserver.cli.flags import HTTP_GROUP, Command, Flag, Parsed, client, query
from caserver.cli.output import chosen_format, complain, failed, format_flag, say, tabbed, table
from caserver.client import ClientError

_FORMATS = ("table", "json")


def _list_peers(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    try:
        document = client(parsed, environ).raft_configuration(**query(parsed)).json()
    except ClientError as exc:
        return failed("Error getting peers: Failed to retrieve raft configuration", exc)
    say(tabbed(document) if layout == "json" else table(_rows(document)))
    return 0


def _rows(document: Any) -> list[list[str]]:
    rows = [["Node", "ID", "Address", "State", "Voter", "RaftProtocol"]]
    for server in document.get("Servers") or ():
        state = "leader" if server.get("Leader") else "follower"
        voter = str(bool(server.get("Voter"))).lower()
        rows.append(
            [
                str(server.get("Node", "")),
                str(server.get("ID", "")),
                str(server.get("Address", "")),
                state,
                voter,
                str(server.get("ProtocolVersion", "")),
            ]
        )
    return rows


_ELSEWHERE = (
    "A key that may go seals nothing that a server uses. Exports, backups and *.old files of a data directory that were "
    "made under it still hold what it seals: delete them, too."
)


def _keyring_status(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    try:
        document = client(parsed, environ).keyring(**query(parsed)).json()
    except ClientError as exc:
        return failed("Error reading the keyring", exc)
    if layout == "json":
        say(tabbed(document))
    else:
        say(table(_key_holders(document)) + "\n" + table(_keys(document)))
        if any(key.get("Removable") for key in document.get("Keys") or ()):
            say(_ELSEWHERE)
    return 0


def _key_holders(document: Any) -> list[list[str]]:
    rows = [["Node", "Holds (first seals)", "Stored under"]]
    for node in document.get("Nodes") or ():
        held = node.get("Keys") or () if node.get("Announced") else ("not announced",)
        rows.append([str(node.get("Node", "")), ", ".join(held), ", ".join(node.get("Stored") or ()) or "-"])
    return rows


def _keys(document: Any) -> list[list[str]]:
    rows = [["Key", "Seals", "May go"]]
    for key in document.get("Keys") or ():
        verdict = "yes" if key.get("Removable") else "no: " + "; ".join(key.get("NeededBecause") or ())
        rows.append([str(key.get("ID", "")), str(len(key.get("Seals") or ())), verdict])
    return rows


def _transfer_leader(parsed: Parsed, environ: Mapping[str, str]) -> int:
    try:
        client(parsed, environ).transfer_leader(parsed.values.get("id"))
    except ClientError as exc:
        return failed("Error transferring leadership", exc)
    say("Success")
    return 0


def _autopilot(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    try:
        document = client(parsed, environ).autopilot_configuration(**query(parsed)).json()
    except ClientError as exc:
        return failed("Error querying Autopilot configuration", exc)
    if layout == "json":
        say(tabbed(document))
        return 0
    for name, default in _AUTOPILOT.items():
        value = document.get(name, default)
        say(f"{name} = {json.dumps(value) if name in _QUOTED or isinstance(value, bool) else value}")
    return 0


# What Consul shows, in its order.
_AUTOPILOT: Mapping[str, object] = {
    "CleanupDeadServers": False,
    "LastContactThreshold": "",
    "MaxTrailingLogs": 0,
    "MinQuorum": 0,
    "ServerStabilizationTime": "",
    "RedundancyZoneTag": "",
    "DisableUpgradeMigration": False,
    "UpgradeVersionTag": "",
}
_QUOTED = ("RedundancyZoneTag", "UpgradeVersionTag")


def _remove_peer(parsed: Parsed, environ: Mapping[str, str]) -> int:
    address, server = parsed.values.get("address"), parsed.values.get("id")
    if not (address or server):
        complain("Error removing peer: an address or id is required for the peer to remove")
        return 1
    if address and server:
        complain("Error removing peer: cannot give both an address and id")
        return 1
    try:
        client(parsed, environ).remove_peer(**({"address": address} if address else {"id": server or ""}))
    except ClientError as exc:
        return failed("Error removing peer", exc)
    say(f'Removed peer with {"address" if address else "id"} "{address or server}"')
    return 0


COMMANDS = {
    "operator autopilot get-config": Command(
        words="operator autopilot get-config",
        usage="[options]",
        description="Displays what the health of servers is judged by; it follows from their configuration files.",
        example="caserver operator autopilot get-config",
        flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
        run=_autopilot,
    ),
    "operator raft remove-peer": Command(
        words="operator raft remove-peer",
        usage="[options]",
        description="Asks the cluster to forget a server. It refuses, and says what to do instead: the list of servers is what "
        "the peer blocks of their files say, and changes only while all are stopped.",
        example="caserver operator raft remove-peer -id=ca3",
        flags=(
            HTTP_GROUP,
            (
                "Command Options",
                (
                    Flag("address", "Raft address of the server.", placeholder="address"),
                    Flag("id", "Id of the server; list-peers shows the ids."),
                ),
            ),
        ),
        run=_remove_peer,
    ),
    "operator raft list-peers": Command(
        words="operator raft list-peers",
        usage="[options]",
        description="Displays the servers of the cluster and which of them leads.",
        example="caserver operator raft list-peers",
        flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
        run=_list_peers,
    ),
    "operator keyring status": Command(
        words="operator keyring status",
        usage="[options]",
        description="Displays which keys of the cluster secret each server holds, what they seal, and which may go.",
        example="caserver operator keyring status",
        flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
        run=_keyring_status,
    ),
    "operator raft transfer-leader": Command(
        words="operator raft transfer-leader",
        usage="[options]",
        description="Hands leadership to another server: the one given with -id, or the one whose log is furthest.",
        example="caserver operator raft transfer-leader -id=ca2",
        flags=(
            HTTP_GROUP,
            ("Command Options", (Flag("id", "The server that shall lead; list-peers shows the ids."),)),
        ),
        run=_transfer_leader,
    ),
}
