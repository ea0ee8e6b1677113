"""``caserver operator``: the servers behind the CA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caserver.cli.flags import HTTP_GROUP, Command, Parsed, client, query
from caserver.cli.output import chosen_format, failed, format_flag, say, tabbed, table
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


COMMANDS = {
    "operator raft list-peers": Command(
        words="operator raft list-peers",
        usage="[options]",
        description="Displays the servers of the cluster and which of them leads.",
        example="caserver operator raft list-peers",
        flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
        run=_list_peers,
    )
}
