"""``caserver members`` and ``caserver info``: who is in the cluster, and what an agent says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from caserver.cli.flags import HTTP_GROUP, Command, Flag, Parsed, Takes, UsageError, client
from caserver.cli.output import chosen_format, complain, failed, format_flag, say, tabbed, table
from caserver.client import ClientError

_FORMATS = ("table", "json")
_STATUS = {0: "none", 1: "alive", 2: "leaving", 3: "left", 4: "failed"}
_EXIT_NONE = 2  # Consul's, if no member is of the status asked for


def _members(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    wanted = _pattern(parsed.values.get("status") or ".*")
    scope = {"wan": "1"} if parsed.switch("wan") else {"segment": "_all"}
    try:
        found = client(parsed, environ).members(**scope).json()
    except ClientError as exc:
        return failed("Error retrieving members", exc)
    members = sorted(
        (each for each in found if wanted.match(_status(each))), key=lambda each: str(each.get("Name", ""))
    )
    if not members:
        return _EXIT_NONE
    if layout == "json":
        say(tabbed(members))
    else:
        say(table(_detailed(members) if parsed.switch("detailed") else _plain(members)))
    return 0


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as exc:
        raise UsageError(f"Failed to compile status regexp: {exc}") from exc


def _status(member: Any) -> str:
    return _STATUS.get(member.get("Status"), "unknown")


def _plain(members: list[Any]) -> list[list[str]]:
    rows = [["Node", "Address", "Status", "Type", "Build", "Protocol", "DC", "Segment"]]
    for member in members:
        tags = member.get("Tags") or {}
        server = tags.get("role") == "consul"
        build = str(tags.get("build", "")).partition(":")[0]
        rows.append(
            [
                *_heading(member),
                "server" if server else "client",
                build,
                str(tags.get("vsn", "")),
                str(tags.get("dc", "")),
                "<all>" if server else str(tags.get("segment") or "<default>"),
            ]
        )
    return rows


def _detailed(members: list[Any]) -> list[list[str]]:
    rows = [["Node", "Address", "Status", "Tags"]]
    for member in members:
        tags = member.get("Tags") or {}
        if tags.get("role") == "consul":
            tags = {**tags, "segment": "<all>"}
        rows.append([*_heading(member), ",".join(f"{name}={tags[name]}" for name in sorted(tags))])
    return rows


def _heading(member: Any) -> list[str]:
    address = str(member.get("Addr", ""))
    shown = f"[{address}]" if ":" in address else address
    return [str(member.get("Name", "")), f"{shown}:{member.get('Port', 0)}", _status(member)]


def _info(parsed: Parsed, environ: Mapping[str, str]) -> int:
    layout = chosen_format(parsed.values.get("format"), *_FORMATS)
    try:
        document = client(parsed, environ).self().json()
    except ClientError as exc:
        return failed("Error querying agent", exc)
    stats = document.get("Stats")
    if not isinstance(stats, dict):
        complain("Agent response did not contain stats; is this the address of a caserver or Consul agent?")
        return 1
    if layout == "json":
        say(tabbed({section: dict(sorted(facts.items())) for section, facts in sorted(stats.items())}))
        return 0
    for section, facts in sorted(stats.items()):
        say(f"{section}:")
        for name, value in sorted(facts.items()):
            say(f"\t{name} = {value}")
    return 0


COMMANDS = {
    "members": Command(
        words="members",
        usage="[options]",
        description="Displays the servers of the cluster, and which of them are alive.",
        example="caserver members",
        flags=(
            HTTP_GROUP,
            (
                "Command Options",
                (
                    Flag("detailed", "Displays all that is told of each server.", takes=Takes.NOTHING),
                    format_flag(*_FORMATS),
                    Flag("segment", "No effect; accepted so that scripts can be kept."),
                    Flag(
                        "status", "Regular expression that the status must match: alive, failed.", placeholder="regexp"
                    ),
                    Flag("wan", "Displays names with their datacenter.", takes=Takes.NOTHING),
                ),
            ),
        ),
        run=_members,
    ),
    "info": Command(
        words="info",
        usage="[options]",
        description="Displays what an agent says of itself: build, Raft, runtime.",
        example="caserver info",
        flags=(HTTP_GROUP, ("Command Options", (format_flag(*_FORMATS),))),
        run=_info,
    ),
}
